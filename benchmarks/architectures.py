"""Which of transformers' causal language models load, how much is quantized, and what is adapted?

Each class has its default configuration with few and narrow layers and random weights. Such a model is
stored, loaded in NF4, given an adapter by each preset, trained for one step, stored and loaded again.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from benchmarks.record import record
from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.compose import compose
from sweeper.config.settings import LoraAdapter, RunSettings, validate
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import (
    attach,
    detach,
    load_adapter,
    modules_without_gradient,
)
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.reduced_model import reduced

VOCABULARY = 2048
SHORT = 2
"""Layers of a model all of whose layers are of one kind."""
LARGEST_WEIGHTS = 70_000_000
"""Weights above which a reduced class is still too large to be examined."""
GEMMA: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    **{"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY},
    **{"hidden_size_per_layer_input": 32},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "codegen": {"n_embd": 256, "n_head": 4, "rotary_dim": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "gemma3n_text": GEMMA,
    "gemma4_text": GEMMA,
    "gemma4_unified_text": GEMMA,
    "gemma4": {"text_config": GEMMA},
    "gemma4_unified": {"text_config": GEMMA},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"hidden_size": 128, "num_heads": 4, "head_dim": 64, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "rwkv": {"hidden_size": 128, "attention_hidden_size": 128},
    "xlstm": {"hidden_size": 128, "num_heads": 4, "num_hidden_layers": 2, "num_blocks": 2},
    "nemotron": {"head_dim": 64, "num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
}
"""Arguments for configurations that have no complete or no reducible default."""
PRESETS = ("attention_qv", "attention", "mlp", "all-linear")
FULLY = 0.99
"""Share from which a class counts as quantized."""
ROUNDING = 1e-4
"""Largest difference of logits that counts as rounding."""
RECORD = Path(__file__).with_suffix(".json")
LONGEST = 160
"""Characters of a reason in the table."""


def configurations() -> dict[str, type[PretrainedConfig]]:
    """Return the configuration classes of transformers' causal language models by model type."""
    return {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def examine(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """Return what happens with a reduced model of a configuration class."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _store(_small(kind), Path(folder, "base"))
        except Exception as error:  # noqa: BLE001 - default configurations can fail in any way
            return {"loads": f"not examined: {_short(error)}"}
        try:
            return {"loads": "yes", **_examine(Path(folder))}
        except ModelError as error:
            return {"loads": f"refused: {_short(error)}"}
        except Exception as error:  # noqa: BLE001 - the failure is the result
            return {"loads": f"fails: {_short(error)}"}


def _short(error: Exception) -> str:
    anywhere = re.sub(rf"{tempfile.gettempdir()}/\w+/", "", str(error))
    words = " ".join(anywhere.split()).partition("': ")
    text = words[2] or words[0] or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _small(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """Return a small configuration whose model computes: a narrow one, or else a short one."""
    problem: Exception = ValueError("no form")
    for reduce in (_narrow, _short_only):
        config = kind(**ARGUMENTS.get(kind.model_type, {}))
        try:
            small = reduce(config)
            _require_small(small)
        except Exception as error:  # noqa: BLE001 - the second form may be possible
            problem = problem if reduce is _short_only else error
        else:
            return small
    raise problem


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """Return the configurations inside of a configuration by their keys."""
    return {name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    for name, part in _parts(config).items():
        setattr(config, name, _narrow(part))
    if getattr(config, "num_hidden_layers", None) is None:
        return _short_only(config)
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    small = reduced(config)
    if getattr(small, "mamba_expand", None) and isinstance(
        getattr(small, "mamba_d_head", None), int
    ):
        small.mamba_n_heads = small.mamba_expand * small.hidden_size // small.mamba_d_head
    if hasattr(small, "decoder_attention_heads"):
        small.decoder_attention_heads = small.num_attention_heads
    return _short_only(small)


def _short_only(config: PretrainedConfig) -> PretrainedConfig:
    for name, part in _parts(config).items():
        setattr(config, name, _short_only(part))
    depth = getattr(config, "num_hidden_layers", None)
    for name in ("num_hidden_layers", "decoder_layers", "encoder_layers", "depth"):
        found = getattr(config, name, None)
        if isinstance(found, int) and (depth is None or not _lists(config, depth)):
            setattr(config, name, min(found, SHORT))
    for name in ("vocab_size", "decoder_vocab_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config


def _lists(config: PretrainedConfig, depth: int) -> list[str]:
    """Return the keys that have one value for each layer."""
    return [n for n, v in vars(config).items() if isinstance(v, list) and len(v) == depth]


def _require_small(config: PretrainedConfig) -> None:
    """Refuse a form that cannot be built, is large, or does not compute without this project."""
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    weights = sum(weight.numel() for weight in meta.parameters())
    if weights > LARGEST_WEIGHTS:
        raise ValueError(f"its smallest form has {weights:,} weights")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        model(input_ids=_ids(), use_cache=False)


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def _store(config: PretrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)


def _examine(folder: Path) -> dict[str, Any]:
    where = f"model.base_model={folder / 'base'}"
    settings = validate(RunSettings, compose([where, "quantization=nf4"]).config)
    with patch("sweeper.modeling.base_model.padding_obstacle", return_value="not examined here"):
        base = load_base(settings.model, settings.quantization, trained=False)
    assert isinstance(settings.adapter, LoraAdapter)
    presets = {preset: _reached(base, settings.adapter, preset) for preset in PRESETS}
    model = attach(base.model, settings.adapter)
    ids = _ids()

    def logits(of: Any) -> torch.Tensor:
        found: torch.Tensor = of(input_ids=ids, use_cache=False).logits.float()
        return found

    logits(model.train()).square().mean().backward()
    dead = modules_without_gradient(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
        expected = logits(model.eval())
        model.save_pretrained(folder / "adapter")
        again = load_adapter(detach(model), folder / "adapter").eval()
        difference = float((logits(again) - expected).abs().max())
    end = base.tokenizer.eos_token_id
    return {
        "quantized": round(base.quantized_share or 0.0, 4),
        "kernel": base.model.config._attn_implementation,
        "reached": {preset: len(found) for preset, found in presets.items()},
        "equal": _equal(presets),
        "without_gradient": sorted({re.sub(r"\d+", "*", name) for name in dead}),
        "stops": end is not None and end < VOCABULARY,
        "reload": difference,
    }


def _reached(base: LoadedBase, adapter: LoraAdapter, preset: str) -> frozenset[str]:
    """Return the names of the weights that a preset adapts, or none if it is refused."""
    try:
        model = attach(base.model, adapter.model_copy(update={"target_modules": preset}))
    except ModelError:
        return frozenset()
    found = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    detach(model)
    return frozenset(found)


def _equal(presets: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Return the presets that adapt the same weights, each group once."""
    groups: dict[frozenset[str], list[str]] = {}
    for preset, found in presets.items():
        if found:
            groups.setdefault(found, []).append(preset)
    return [names for names in groups.values() if len(names) > 1]


def main() -> None:
    """Examine every class, or only the model types that are named, and record what happens."""
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted, kinds = sys.argv[1:], configurations()
    results: dict[str, Any] = stored()["results"] if wanted else {}
    for name in wanted or sorted(kinds):
        results[name] = examine(kinds[name])
        print(name, results[name], file=sys.stderr, flush=True)
        gc.collect()
    loaded = sum(found["loads"] == "yes" for found in results.values())
    figures = {
        "transformers": transformers.__version__,
        "loads": loaded,
        "classes": len(results),
        "results": dict(sorted(results.items())),
    }
    record("architectures", figures)


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the rows of the table in docs/models.md: what holds, and for which model types."""
    loaded = {name: found for name, found in results.items() if found["loads"] == "yes"}
    notes = {name: _notes(found) for name, found in loaded.items()}
    rows: dict[str, list[str]] = {"as asked": [name for name in notes if not notes[name]]}
    for name in loaded:
        for what, detail in notes[name]:
            rows.setdefault(what, []).append(f"{name}{detail}")
    for name in results.keys() - loaded.keys():
        rows.setdefault(_cell(results[name]["loads"]), []).append(name)
    first, *others = rows.items()
    return [
        f"| {what} | {len(names)} | {', '.join(sorted(names))} |"
        for what, names in (first, *sorted(others))
    ]


def _notes(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what does not hold for a class that loads, each with its detail."""
    absent = [preset for preset in PRESETS if not found["reached"][preset]]
    share, dead = found["quantized"], found["without_gradient"]
    notes = [("less than 99 % is quantized", f" ({share:.0%})")] if share < FULLY else []
    notes += [(f"no module for {', '.join(absent)}", "")] if absent else []
    notes += [(f"{' and '.join(same)} are the same modules", "") for same in found["equal"]]
    notes += [("adapted without a gradient", f" ({_kinds(dead)})")] if dead else []
    other = found["reload"] > ROUNDING
    return notes + (
        [("other logits after reloading", f" ({found['reload']:.0e})")] if other else []
    )


def _kinds(names: list[str]) -> str:
    return " and ".join(sorted({name.rpartition(".")[2] for name in names}))


def _cell(reason: str) -> str:
    if "reads text in both directions" in reason:
        return "refused: reads text in both directions by default"
    return reason.replace("|", "/")


def stored() -> dict[str, Any]:
    """Return the figures of the last record."""
    figures: dict[str, Any] = json.loads(RECORD.read_text())["figures"]
    return figures


if __name__ == "__main__":
    main()
