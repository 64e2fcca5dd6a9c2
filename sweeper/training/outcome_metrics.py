"""Compute the metrics of a trial's outcome from its spool, schedule and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sweeper.config.settings import TrainingSettings
from sweeper.modeling.adapter import ParameterCount
from sweeper.training.schedule import TrialSchedule

MOVING_AVERAGE = "eval/loss_moving_average"
"""Metric of a row of the spool that is no judgement of the row's own model."""


def parameter_figures(count: ParameterCount) -> dict[str, float]:
    """Return parameter counts and the trainable percentage, of the total (as PEFT) and of the base."""
    return {
        "parameters/total": float(count.total),
        "parameters/trainable": float(count.trainable),
        "parameters/trainable_percent": count.percent,
        "parameters/trainable_percent_of_base": count.percent_of_base,
    }


def schedule_figures(training: TrainingSettings, schedule: TrialSchedule) -> dict[str, float]:
    """Return how the trial was divided into steps at its end (out of memory changes micro-batches)."""
    return {
        "training/micro_batch": float(training.per_device_train_batch_size),
        "training/gradient_accumulation_steps": float(training.gradient_accumulation_steps),
        "training/effective_batch": float(training.effective_batch_size),
        "training/total_steps": float(schedule.total_steps),
        "training/steps_per_epoch": float(schedule.steps_per_epoch),
        "training/last_batch": float(schedule.last_batch),
        "training/warmup_steps": float(schedule.warmup_steps),
    }


def loss_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean and the last training loss of a trial's spool, earlier attempts included."""
    train = _training_losses(rows)
    if not train:
        return {}
    return {"train/mean_loss": _mean_by_step(train), "train/final_loss": train[-1][1]}


def best_figures(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], best_step: int
) -> dict[str, float]:
    """Return the metrics of the stored checkpoint and their gap to the training loss.

    Args:
        rows: the trial's spool.
        metrics: the checkpoint's evaluation. `eval/loss` becomes `best/eval_loss`.
        best_step: optimiser step of the checkpoint.

    Returns:
        The metrics. The gap is to the last training loss logged up to the best step, which includes
        the effect of dropout.
    """
    figures = {
        name.replace("eval/", "best/eval_") if name.startswith("eval/") else name: value
        for name, value in metrics.items()
    }
    figures["best/step"] = float(best_step)
    before = [loss for step, loss in _training_losses(rows) if step <= best_step]
    if before:
        figures["best/train_loss"] = before[-1]
        figures["best/eval_minus_train_loss"] = metrics["eval/loss"] - before[-1]
    return figures


def look_at(rows: Iterable[Mapping[str, Any]], step: int) -> dict[str, float] | None:
    """Return the metrics of a trial's look at the model of a step, or None if its spool has none."""
    found = [row for row in rows if row["step"] == step and "eval/loss" in row]
    if not found:
        return None
    return {
        name: float(value)
        for name, value in found[-1].items()
        if name.startswith("eval/") and name != MOVING_AVERAGE
    }


def _training_losses(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row["train/loss"])) for row in rows if "train/loss" in row]


def _mean_by_step(losses: Sequence[tuple[int, float]]) -> float:
    """Return the mean loss over all steps of (step, loss) pairs."""
    # Each logged loss is the mean since the previous log, so its weight is the steps between the two
    starts = [0, *(step for step, _ in losses)]
    weighted = sum(
        # not strict: the last step is the start of no logged loss
        (step - start) * loss
        for start, (step, loss) in zip(starts, losses, strict=False)
    )
    return weighted / losses[-1][0]
