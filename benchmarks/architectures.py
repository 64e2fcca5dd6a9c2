"""Which of transformers' causal language models load, how much of each is quantized, and what is adapted?

Each class has its default configuration, reduced to a few narrow layers, with random weights. It is stored,
loaded in NF4, given an adapter by each preset, trained for one step, stored and loaded again.
"""

from __future__ import annotations

import copy
import gc
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

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
LARGEST_WEIGHTS = 40_000_000
"""Weights above which a reduced class is still too large to be examined."""
PRESETS = ("attention_qv", "attention", "mlp", "all-linear")
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
    words = " ".join(str(error).split()).partition("': ")
    text = words[2] or words[0] or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _small(kind: type[PretrainedConfig]) -> PretrainedConfig:
    config = kind()
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    small = reduced(config)
    for part in {id(each): each for each in (small, small.get_text_config())}.values():
        if hasattr(part, "vocab_size"):
            part.vocab_size = VOCABULARY
    return small


def _store(config: PretrainedConfig, folder: Path) -> None:
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    weights = sum(weight.numel() for weight in meta.parameters())
    if weights > LARGEST_WEIGHTS:
        raise ValueError(f"its smallest form has {weights:,} weights")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)


def _examine(folder: Path) -> dict[str, Any]:
    where = f"model.base_model={folder / 'base'}"
    settings = validate(RunSettings, compose([where, "quantization=nf4"]).config)
    base = load_base(settings.model, settings.quantization, trained=False)
    assert isinstance(settings.adapter, LoraAdapter)
    presets = {preset: _reached(base, settings.adapter, preset) for preset in PRESETS}
    model = attach(base.model, settings.adapter)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))

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
        "attention": base.model.config._attn_implementation,
        **presets,
        "without_gradient": dead,
        "stops": end is not None and end < VOCABULARY,
        "reload": difference,
    }


def _reached(base: LoadedBase, adapter: LoraAdapter, preset: str) -> int:
    """Return how many weights a preset adapts, or 0 if it is refused."""
    try:
        model = attach(base.model, adapter.model_copy(update={"target_modules": preset}))
    except ModelError:
        return 0
    count = sum(hasattr(module, "lora_A") for module in model.modules())
    detach(model)
    return count


def main() -> None:
    """Examine every class and record what happens."""
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results: dict[str, Any] = {}
    for name, kind in sorted(configurations().items()):
        results[name] = examine(kind)
        print(name, results[name], file=sys.stderr, flush=True)
        gc.collect()
    loaded = sum(found["loads"] == "yes" for found in results.values())
    record("architectures", {"loads": loaded, "classes": len(results), "results": results})


if __name__ == "__main__":
    main()
