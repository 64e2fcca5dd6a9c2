"""Resolve the modules that get an adapter from presets, names, regular expressions and layer ranges.

Works on module names only, so on models on the meta device as well as on loaded ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sweeper.config.settings import LAYERS
from sweeper.core.errors import ModelError

PRESETS: dict[str, tuple[str, ...]] = {
    # Preset -> endings of module names over all architectures. Fused projections belong to a preset if
    # they contain one of its modules
    "attention_qv": (
        *("q_proj", "v_proj", "qkv_proj"),  # Llama, Qwen, Mistral, Gemma, Phi, OPT, GPT-J; Phi-3
        *("attn.c_attn", "query_key_value", "Wqkv"),  # GPT-2; GPT-NeoX, Falcon, BLOOM; MPT
    ),
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),
        *("self_attn.dense", "attention.dense", "self_attention.dense"),  # Phi; GPT-NeoX; Falcon
        *("attn.c_attn", "attn.c_proj", "query_key_value", "Wqkv"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("fc1", "fc2", "fc_in", "fc_out"),  # Phi, OPT; GPT-J
        *("mlp.c_fc", "mlp.c_proj", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-2; GPT-NeoX, Falcon
    ),
}
ALL_LINEAR = "all-linear"
REGEX = "regex:"
"""Prefix of a regular expression over full module names. A misspelt name without it is an error."""


def resolve_targets(
    target_modules: str | Sequence[str],
    names: Sequence[str],
    layers_to_transform: str | Sequence[int] | None = None,
) -> str | list[str]:
    """Return the value for PEFT's `target_modules`: all-linear, name endings, or full names.

    Args:
        target_modules: a preset (attention_qv, attention, mlp, all-linear), `regex:` and a pattern that
            matches a full module name, one module name, or several names.
        names: full names of the model's linear modules.
        layers_to_transform: layers that get an adapter: indices, "0-11" (both ends included), "last-8",
            or None for all.

    Raises:
        ModelError: nothing matches. The message lists the presets and the endings that exist.
    """
    # PEFT's own layers_to_transform refuses all-linear and regular expressions, so layers become names
    if layers_to_transform is not None:
        layers = set(resolve_layers(layers_to_transform, names))
        names = [name for name in names if layer_of(name) in layers]
    if isinstance(target_modules, str) and target_modules.startswith(REGEX):
        return _matching(target_modules, names)
    if target_modules == ALL_LINEAR:
        return ALL_LINEAR if layers_to_transform is None else list(names)
    endings = _endings(target_modules, names)
    if layers_to_transform is None:
        return endings
    return [name for name in names if any(_ends_with(name, ending) for ending in endings)]


def _endings(target_modules: str | Sequence[str], names: Sequence[str]) -> list[str]:
    preset = PRESETS.get(target_modules) if isinstance(target_modules, str) else None
    wanted = preset or ([target_modules] if isinstance(target_modules, str) else target_modules)
    found = [ending for ending in wanted if any(_ends_with(name, ending) for name in names)]
    missing = [] if preset else [ending for ending in wanted if ending not in found]
    if missing or not found:
        raise _no_such_module(target_modules, ", ".join(missing or wanted), names)
    return found


def _matching(target_modules: str, names: Sequence[str]) -> list[str]:
    pattern = target_modules.removeprefix(REGEX)
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ModelError(
            f"adapter.target_modules={target_modules!r}: {pattern!r} is not a regular expression: "
            f"{error}"
        ) from error
    if not found:
        example = f" (a full name is {names[0]})" if names else ""
        raise _no_such_module(target_modules, f"like {pattern}{example}", names)
    return found


def resolve_layers(layers: str | Sequence[int], names: Sequence[str]) -> list[int]:
    """Return the layer indices of a range in this model.

    Raises:
        ModelError: a layer does not exist.
    """
    existing = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    wanted = _layers(layers, existing)
    missing = [layer for layer in wanted if layer not in existing]
    if missing or not wanted:
        valid = f"layers 0 to {existing[-1]}" if existing else "no numbered layers"
        raise ModelError(f"adapter.layers_to_transform={layers!r}: the model has {valid}")
    return wanted


def _layers(layers: str | Sequence[int], existing: Sequence[int]) -> list[int]:
    if not isinstance(layers, str):
        return list(layers)
    match = LAYERS.fullmatch(layers)
    assert match is not None, "the settings' validation refuses other texts"
    if count := match["count"]:
        # More layers than exist become indices that do not exist, which resolve_layers refuses
        missing = range(int(count) - len(existing))
        return [*existing[-int(count) :], *(existing[-1] + 1 + extra for extra in missing)]
    return list(range(int(match["first"]), int(match["last"]) + 1))


def layer_of(name: str) -> int | None:
    """Return the index of a module's layer, or None: the first number in its name, as in PEFT."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def require_matches(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that each of PEFT's pattern keys (a name's ending, or a regex over it) matches a module.

    Raises:
        ModelError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            raise _no_such_module({pattern}, pattern, names, key)


def _no_such_module(
    value: object, wanted: str, names: Sequence[str], key: str = "target_modules"
) -> ModelError:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    presets = f". Presets: {', '.join([*PRESETS, ALL_LINEAR])}" if key == "target_modules" else ""
    return ModelError(
        f"adapter.{key}={value!r}: the model has no module named {wanted}. "
        f"Its linear modules are {', '.join(endings)}{presets}"
    )


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
