"""CPU seconds of the memory estimate before the first step of each new structure, for a GPU of 24 GiB.

The device is pretended, so no GPU is needed: the estimate computes on shapes. Four structures (another
rank each) of two architectures ask what a trial asks: whether its smallest form fits, then the largest
micro-batch that fits without and with recomputed activations. The code here and that before answer in
turn, each time in a process of its own.

    git worktree add /tmp/before 2676408       # there each question builds a model
    python benchmarks/estimate_seconds.py /tmp/before
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import record
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, TrialSettings, validate
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.micro_batch import resolve, smallest_form

GPU_MIB = 24 * 1024
RANKS = (8, 64, 16, 32)
"""The last two lie between others, as most ranks of a search do."""
ROUNDS = 3
LENGTH, TARGETS = 1024, 512
SHAPES: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    ),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ),
}


def trial(folder: Path, rank: int, *further: str) -> TrialSettings:
    """Return a QLoRA trial of this rank on the architecture of a folder."""
    overrides = [f"model.base_model={folder}", f"adapter.r={rank}", "quantization=nf4"]
    overrides += ["model.dtype=bfloat16", "adapter.target_modules=all-linear", "training=real"]
    overrides += ["training.per_device_train_batch_size=4", *further]
    return validate(RunSettings, compose(overrides).config).trial


def fits_24_gib(asked: list[str]) -> Callable[[TrialSettings], bool]:
    """Return `Fits` for the pretended GPU. The list receives each question once."""
    known: dict[str, float] = {}

    def fits(settings: TrialSettings) -> bool:
        key = settings.structure
        if key not in known:
            asked.append(key)
            cuda = torch.device("cuda")
            found = estimate_trial(settings, cuda, length=LENGTH, targets=TARGETS)
            known[key] = found.total
        return known[key] < 0.8 * GPU_MIB

    return fits


def before_the_first_step(settings: TrialSettings) -> dict[str, float]:
    """Ask what a trial asks, and return the CPU seconds and the number of different questions."""
    asked: list[str] = []
    fits, began = fits_24_gib(asked), time.process_time()
    fits(smallest_form(settings))
    resolved = resolve(settings, fits, on_gpu=True)
    fits(resolved)
    return {
        "cpu_seconds": round(time.process_time() - began, 2),
        "questions": len(asked),
        "micro_batch": resolved.training.per_device_train_batch_size,
    }


def ask() -> dict[str, list[dict[str, float]]]:
    """Return the seconds of each structure in turn with the code that this process imports."""
    found: dict[str, list[dict[str, float]]] = {}
    with TemporaryDirectory() as place:
        for name, config in SHAPES.items():
            folder = Path(place) / name
            config.save_pretrained(folder)
            # torch's own first use costs seconds
            before_the_first_step(trial(folder, 2, "adapter.use_dora=true"))
            found[name] = [before_the_first_step(trial(folder, rank)) for rank in RANKS]
    return found


def ask_in(checkout: Path) -> dict[str, Any]:
    """Return what `ask` returns in a process that imports the code of a checkout."""
    answer = subprocess.run(
        [sys.executable, __file__, "--here"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure both sides in turn, and write benchmarks/estimate_seconds.json."""
    sides = {"before": Path(sys.argv[1]).resolve(), "now": Path(__file__).resolve().parents[1]}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, checkout in sides.items():
            runs[side].append(ask_in(checkout))
            print(side, json.dumps(runs[side][-1]), flush=True)
    figures: dict[str, Any] = {"ranks": RANKS, "load_average": round(os.getloadavg()[0], 1)}
    for name in SHAPES:
        asked = {side: [run[name] for run in found] for side, found in runs.items()}
        figures[name] = {
            "cpu_seconds_by_rank": {side: medians(each) for side, each in asked.items()},
            "runs": asked,
        }
    record("estimate_seconds", figures)


def medians(runs: list[list[dict[str, float]]]) -> list[float]:
    """Return the median CPU seconds of each rank over the rounds."""
    return [median(run[at]["cpu_seconds"] for run in runs) for at in range(len(RANKS))]


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        print(json.dumps(ask()))
    else:
        main()
