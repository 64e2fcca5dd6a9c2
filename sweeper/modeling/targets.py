"""Named target-module presets, resolved against the modules a model really has."""

from __future__ import annotations

from collections.abc import Sequence

from sweeper.errors import ModelError

PRESETS: dict[str, tuple[str, ...]] = {
    # name -> module-name endings over architectures: Llama/Qwen/Mistral/Gemma, Phi, GPT-2, GPT-NeoX
    "attention_qv": ("q_proj", "v_proj", "attn.c_attn", "query_key_value"),
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "self_attn.dense"),
        *("attn.c_attn", "attn.c_proj", "query_key_value", "attention.dense"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
        *("mlp.c_fc", "mlp.c_proj", "dense_h_to_4h", "dense_4h_to_h"),
    ),
}
ALL_LINEAR = "all-linear"


def resolve_targets(target_modules: str | Sequence[str], names: Sequence[str]) -> str | list[str]:
    """What PEFT's `target_modules` gets for a preset, a name, or a list of names.

    Args:
        target_modules: a preset (attention_qv, attention, mlp, all-linear), one module name, or names.
        names: the full names of the model's linear modules.

    Raises:
        ModelError: nothing matches; lists the presets and the endings that exist.
    """
    if target_modules == ALL_LINEAR:
        return ALL_LINEAR
    preset = PRESETS.get(target_modules) if isinstance(target_modules, str) else None
    wanted = preset or ([target_modules] if isinstance(target_modules, str) else target_modules)
    found = [ending for ending in wanted if any(_ends(name, ending) for name in names)]
    missing = [] if preset else [ending for ending in wanted if ending not in found]
    if missing or not found:
        endings = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ModelError(
            f"adapter.target_modules={target_modules!r}: the model has no module named "
            f"{', '.join(missing or wanted)}; its linear modules are {', '.join(endings)}; "
            f"presets: {', '.join([*PRESETS, ALL_LINEAR])}"
        )
    return found


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
