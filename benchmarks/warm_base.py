"""From which size on is a cached quantized base faster than quantizing the base again?

CPU seconds of one thread, the better of three, for Llamas with random weights: loading depends on
shapes only. Verifying the entry's manifest counts as loading it, as it does in a worker.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import record
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, validate
from sweeper.modeling import quantized_cache
from sweeper.modeling.base_model import load_base
from sweeper.modeling.model_source import weights_bytes

SHAPES = {"1M": (128, 6, 2048), "16M": (320, 8, 8192), "134M": (768, 12, 32000)}
"""Hidden size, layers, vocabulary."""
ROUNDS = 3


def make_base(folder: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """A Llama with random weights and the embedded base's tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "vocab_size": vocabulary}
    config = LlamaConfig(**shape, num_hidden_layers=layers, num_attention_heads=hidden // 64)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)


def seconds(base: Path, quantization: str, smallest: int) -> float:
    """CPU seconds of loading; the cache is used from `smallest` bytes on."""
    quantized_cache.SMALLEST_BYTES = smallest
    overrides = [f"model.base_model={base}", f"quantization={quantization}"]
    settings = validate(RunSettings, compose(overrides).config)
    began = time.process_time()
    load_base(settings.model, settings.quantization, trained=False)
    return time.process_time() - began


def measure(base: Path, quantization: str) -> dict[str, float]:
    """Anew and from the cache; the first load of each is not counted."""
    never, always = 2**60, 0
    taken = {
        name: [seconds(base, quantization, smallest) for _ in range(ROUNDS + 1)][1:]
        for name, smallest in {"quantized anew": never, "from the cache": always}.items()
    }
    best = {name: round(min(values), 2) for name, values in taken.items()}
    return {**best, "ratio": round(best["quantized anew"] / best["from the cache"], 1)}


def main() -> None:
    """Every shape, NF4 and int8."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        quantized_cache.cache_folder = lambda: Path(root) / "cache"
        for name, shape in SHAPES.items():
            base = Path(root) / name
            make_base(base, *shape)
            mib = round(weights_bytes(base) / 2**20)
            figures[f"{name} parameters, {mib} MiB"] = {
                kind: measure(base, kind) for kind in ("nf4", "int8")
            }
    record("warm_base", {"unit": "CPU seconds", **figures})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
