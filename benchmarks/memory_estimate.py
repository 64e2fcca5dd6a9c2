"""The memory estimate against the measured peak of real training steps, on a CPU.

Each setting trains three steps of a plain loop in a process of its own, on a randomly initialised Llama
of 80M parameters. Measured is the largest resident size from the end of loading to the end of training
(VmHWM, reset after loading), less the resident size before loading; so interpreter and libraries count
on neither side. Linux only.

glibc's allocator keeps freed blocks of up to 32 MiB for reuse and finds few takers, so that the resident
size of a CPU trial is far above what its tensors need at any moment. The estimate is about tensors: the
table is measured with MALLOC_MMAP_THRESHOLD_ fixed, which gives every block back at once. To see one
setting under the default: python benchmarks/memory_estimate.py "LoRA, fp32" BASE_FOLDER
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes as bnb
import psutil
import torch
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.compose import compose
from sweeper.config.settings import LoraAdapter, RunSettings, TrialSettings, validate
from sweeper.evaluation.token_loss import target_nll
from sweeper.modeling.adapter import attach
from sweeper.modeling.base_model import load_base
from sweeper.modeling.hardware import device
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.peak_memory import peak_mib, reset_peak

STEPS = 3
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODEL = {
    "vocab_size": 16_384,
    "hidden_size": 640,
    "intermediate_size": 1_728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Setting:
    """One training run: overrides of the default config, and the length of its rows."""

    overrides: tuple[str, ...]
    batch_size: int
    length: int


LORA, FULL = "adapter=lora", "adapter=none"
FP32, NF4, INT8 = "quantization=none", "quantization=nf4", "quantization=int8"
CHECKPOINTING = "training.activation_checkpointing=true"
EAGER = "model.attn_implementation=eager"
EIGHT_BIT = "training.optim=adamw_8bit"
SETTINGS = {
    "LoRA, fp32": Setting((LORA, FP32), 2, 128),
    "LoRA, NF4": Setting((LORA, NF4), 2, 128),
    "LoRA, int8": Setting((LORA, INT8), 2, 128),
    "LoRA, NF4, checkpointing": Setting((LORA, NF4, CHECKPOINTING), 4, 128),
    "LoRA, fp32, 512 tokens, eager": Setting((LORA, FP32, EAGER), 1, 512),
    "full, adamw_torch": Setting((FULL, FP32), 2, 128),
    "full, adamw_8bit": Setting((FULL, FP32, EIGHT_BIT), 2, 128),
}


def run(setting: Setting, base: Path) -> dict[str, float]:
    """Estimate, then train, in this process: MiB."""
    overrides = [
        *setting.overrides,
        *(f"model.base_model={base}", f"training.per_device_train_batch_size={setting.batch_size}"),
        *("training.gradient_accumulation_steps=1", "training.learning_rate=1e-4"),
    ]
    settings = validate(RunSettings, compose(overrides).config).trial
    estimate = estimate_trial(settings, device(), length=setting.length)
    measured = train(settings, setting.length)
    return {**asdict(estimate), "estimated": estimate.total, "measured": measured}


def train(settings: TrialSettings, length: int) -> float:
    """Peak resident MiB of three training steps beyond what was resident before loading."""
    gc.collect()
    before = psutil.Process().memory_info().rss / 2**20
    lora = isinstance(settings.adapter, LoraAdapter)
    model = load_base(settings.model, settings.quantization, trained=not lora).model
    for weight in model.parameters():  # off the file mapping, whose pages are not the model's need
        if weight.is_floating_point():
            weight.data = weight.data.clone()
    if isinstance(settings.adapter, LoraAdapter):
        model = attach(model, settings.adapter)
    if settings.training.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    eight_bit = settings.training.optim == "adamw_8bit"
    optimizer = (bnb.optim.AdamW8bit if eight_bit else torch.optim.AdamW)(weights, lr=1e-4)
    ids = torch.randint(
        0, MODEL["vocab_size"], (settings.training.per_device_train_batch_size, length)
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gc.collect()
    reset_peak()
    for _ in range(STEPS):
        (target_nll(model, batch) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak_mib() - before


def save_base(folder: Path) -> None:
    """A random Llama with the embedded tokenizer."""
    AutoModelForCausalLM.from_config(LlamaConfig(**MODEL)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)


def in_a_process(name: str, base: Path) -> dict[str, float]:
    """Run one setting in a child of this process, which has imported everything and computed nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(run, (SETTINGS[name], base))
    error = 100 * (found["estimated"] / found["measured"] - 1)
    rounded = {key: round(value, 1) for key, value in {**found, "error %": error}.items()}
    print(
        f"{name:<36}{rounded['estimated']:>9} MiB estimated{rounded['measured']:>9} MiB measured"
        f"{rounded['error %']:>+8} %",
        flush=True,
    )
    return rounded


def compare() -> None:
    """All settings, as a table and as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.apply(save_base, (base,))
        found = {name: in_a_process(name, base) for name in SETTINGS}
    errors = [abs(row["error %"]) for row in found.values()]
    figures = {
        "MiB": found,
        "absolute error %": {"mean": round(sum(errors) / len(errors), 1), "largest": max(errors)},
        "model": MODEL,
    }
    record("memory_estimate", figures)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(run(SETTINGS[sys.argv[1]], Path(sys.argv[2]))))
    elif any(key not in os.environ for key in GIVE_BACK):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **GIVE_BACK})
    else:
        compare()
