"""How much cheaper is a training step whose adapted layers compute in one function, and is it the same?

CPU seconds of one thread for whole steps (loss, gradients, clipping, AdamW) on the embedded base and its
data, 16 rows each, and for the losses of 64 rows. PEFT's layers and those of modeling/frozen_linear.py
take turns. The first steps of each are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.record import record
from sweeper.config.compose import compose
from sweeper.config.settings import LoraAdapter, RunSettings, validate
from sweeper.data.padding_free import batch_collator
from sweeper.evaluation.token_loss import evaluate_examples, target_nll
from sweeper.modeling.adapter import attach
from sweeper.modeling.base_model import load_base
from sweeper.modeling.frozen_linear import FUSED
from sweeper.training.prepared_data import prepare

TRIALS = {
    "NF4, all-linear": ("adapter.target_modules=all-linear",),
    "NF4, attention": ("adapter.target_modules=attention",),
    "dense, all-linear": ("adapter.target_modules=all-linear", "quantization=none"),
}
RANK, ROWS, STEPS, WARM, JUDGED, JUDGEMENTS = 16, 16, 32, 3, 64, 5
PLAIN = {fused: plain for plain, fused in FUSED.items()}
SIDES = {"PEFT": PLAIN, "one function": FUSED}


def take(model: torch.nn.Module, kinds: dict[type, type]) -> None:
    """Let the layers of a model be of the classes of one side."""
    for layer in model.modules():
        if type(layer) in kinds:
            layer.__class__ = kinds[type(layer)]


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


class TrainingSteps:
    """Steps of one adapter, and the judgement of it."""

    def __init__(self, overrides: tuple[str, ...]) -> None:
        settings = validate(RunSettings, compose([f"adapter.r={RANK}", *overrides]).config).trial
        base = load_base(settings.model, settings.quantization, trained=False)
        assert isinstance(settings.adapter, LoraAdapter)
        torch.manual_seed(0)
        self.model = attach(base.model, settings.adapter)
        self.model.train()
        self.rows = prepare(settings.data, base).train.rows
        self.collator = batch_collator(self.model, 0)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        for name, weight in self.model.named_parameters():
            if "lora_B" in name:  # as after some training
                torch.nn.init.normal_(weight, std=0.02)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-6)

    def gradients(self, number: int) -> tuple[float, list[torch.Tensor]]:
        """Return the loss of a batch and its gradients."""
        first = number * ROWS % (len(self.rows) - ROWS)
        batch = self.collator(self.rows[first : first + ROWS])
        self.optimizer.zero_grad()
        loss = target_nll(self.model, batch) / 500
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), [p.grad.clone() for p in self.weights if p.grad is not None]

    def step(self, number: int) -> None:
        """Train one step."""
        self.gradients(number)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()

    def judge(self) -> float:
        """Return the loss on the judged rows."""
        return sum(
            found.nll
            for found in evaluate_examples(self.model, self.rows[:JUDGED], self.collator, ROWS)
        )


def compare(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Take turns with both sides, and return medians, ratios and differences."""
    steps = TrainingSteps(overrides)
    found, judged = {}, {}
    for name, kinds in SIDES.items():
        take(steps.model, kinds)
        found[name] = steps.gradients(0)
        judged[name] = steps.judge()
    trained: dict[str, list[float]] = {name: [] for name in SIDES}
    judging: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(WARM + STEPS):
        for name in list(SIDES)[:: 1 if number % 2 else -1]:
            take(steps.model, SIDES[name])
            trained[name].append(seconds(partial(steps.step, number)))
            if number < JUDGEMENTS + 1:
                judging[name].append(seconds(steps.judge))
    (loss, gradients), (other, others) = found.values()
    return {
        "ms of a step": {
            n: round(1e3 * statistics.median(t[WARM:]), 1) for n, t in trained.items()
        },
        "ratio of a step, median of pairs": _ratio(trained, WARM),
        "ms of 64 judged rows": {
            name: round(1e3 * statistics.median(t[1:]), 1) for name, t in judging.items()
        },
        "ratio of judging, median of pairs": _ratio(judging, 1),
        "relative difference of the loss": abs(other - loss) / loss,
        "largest relative difference of a gradient's norm": max(
            float((b - a).norm() / a.norm()) for a, b in zip(gradients, others, strict=True)
        ),
        "relative difference of the judged loss": abs(judged["one function"] / judged["PEFT"] - 1),
    }


def _ratio(sides: dict[str, list[float]], warm: int) -> float:
    plain, fused = (times[warm:] for times in sides.values())
    return round(statistics.median(a / b for a, b in zip(plain, fused, strict=True)), 3)


def main() -> None:
    """Measure each trial."""
    torch.set_num_threads(1)
    record("frozen_linear", {name: compare(overrides) for name, overrides in TRIALS.items()})


if __name__ == "__main__":
    main()
