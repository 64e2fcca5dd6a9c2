"""What would judging on merged weights and a frozen garbage collector save? Both are not built.

CPU seconds of one thread: judging 96 rows on the embedded base in NF4 with an adapter, as it is and with
every quantized layer replaced by a dense one (merging is counted), and one garbage collection.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer

from benchmarks.record import record
from sweeper.config.compose import compose
from sweeper.config.settings import LoraAdapter, RunSettings, validate
from sweeper.data.padding_free import batch_collator
from sweeper.data.tokens import IGNORED, Tokens
from sweeper.evaluation.token_loss import LossSum, evaluate_examples
from sweeper.modeling.adapter import attach
from sweeper.modeling.base_model import load_base
from sweeper.training import trial_runner  # what a worker has imported

ROUNDS = 5
ROWS, BATCH = 96, 16


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


def rows(vocabulary: int) -> list[Tokens]:
    """Return random rows of 30 to 140 tokens."""
    chance = random.Random(0)
    found = []
    for length in (chance.randint(30, 140) for _ in range(ROWS)):
        ids = [chance.randrange(vocabulary) for _ in range(length)]
        found.append({"input_ids": ids, "labels": [IGNORED] * (length // 2) + ids[length // 2 :]})
    return found


def dense(layer: Any) -> torch.nn.Linear:
    """Return a dense layer with the weights of a quantized one and of its adapter."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    if isinstance(layer, LoraLayer):
        weight = weight + layer.get_delta_weight("default")
    merged = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None)
    merged.weight.data = weight
    if base.bias is not None:
        merged.bias.data = base.bias.data
    return merged


@contextmanager
def merged(model: torch.nn.Module) -> Iterator[None]:
    """Replace all quantized layers by dense ones for the duration of the context."""
    kinds = (LoraLayer, bnb.nn.Linear4bit)
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    tops = [(name, layer) for name, layer in found if not name.endswith("base_layer")]
    for name, layer in tops:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, dense(layer))
    try:
        yield
    finally:
        for name, layer in tops:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)


def judging() -> dict[str, Any]:
    """Judge in both ways alternately. A first round of each is not counted."""
    settings = validate(RunSettings, compose(["quantization=nf4"]).config).trial
    base = load_base(settings.model, settings.quantization, trained=False)
    assert isinstance(settings.adapter, LoraAdapter)
    model = attach(base.model, settings.adapter)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    examples = rows(base.model.get_input_embeddings().weight.shape[0])
    collator = batch_collator(model, 0)

    def judge() -> list[LossSum]:
        return evaluate_examples(model, examples, collator, BATCH)

    def judge_merged() -> list[LossSum]:
        with merged(model):
            return judge()

    with_adapter, dense_ones = [], []
    for _ in range(ROUNDS + 1):
        with_adapter.append(timed(judge))
        dense_ones.append(timed(judge_merged))
    (_, plain), (_, other) = with_adapter[-1], dense_ones[-1]
    spent = [statistics.median(s for s, _ in side[1:]) for side in (with_adapter, dense_ones)]
    return {
        "CPU seconds with the adapter": round(spent[0], 3),
        "CPU seconds merged, with the merging": round(spent[1], 3),
        "ratio": round(spent[0] / spent[1], 2),
        "largest relative difference of a row's loss": max(
            abs(a.nll - b.nll) / a.nll for a, b in zip(plain, other, strict=True)
        ),
    }


def collections() -> dict[str, Any]:
    """Collect garbage in a process that has imported what a worker imports, plain and frozen."""
    assert trial_runner.TransformersRunner is not None
    gc.collect()
    plain = statistics.median(timed(gc.collect)[0] for _ in range(ROUNDS))
    count = len(gc.get_objects())
    gc.freeze()
    frozen = statistics.median(timed(gc.collect)[0] for _ in range(ROUNDS))
    gc.unfreeze()
    return {"objects": count, "CPU seconds": round(plain, 3), "frozen": round(frozen, 3)}


def main() -> None:
    """Measure both."""
    torch.set_num_threads(1)
    figures = {"a garbage collection": collections(), "judging": judging()}
    record("padding_left_out", figures)


if __name__ == "__main__":
    main()
