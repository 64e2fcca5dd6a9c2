"""Rules that stop a running trial: early stopping and divergence.

The rules depend on losses by step only, so replaying the rows that an earlier attempt wrote restores
their state. transformers' EarlyStoppingCallback starts from zero after a resume.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from sweeper.config.settings import Objective, TrainingSettings

LOSS_SCALE = "train/loss_scale"
"""fp16's loss scale. Only rows of trials with scaled gradients have this metric."""


class MovingAverage:
    """The mean of the last `window` values, or of fewer at the start."""

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Add a value and return the new average."""
        self._values.append(value)
        return sum(self._values) / len(self._values)


class EarlyStopping:
    """Stop after `patience` evaluations in a row without an improvement of more than `threshold`.

    Improvements are measured from the last value that counted as one, so many small improvements add
    up. transformers' EarlyStoppingCallback forgets them. Evaluations before `first_step` count, but
    do not stop the trial.
    """

    def __init__(self, patience: int | None, threshold: float, first_step: float) -> None:
        self._patience = patience
        self._threshold = threshold
        self._first_step = first_step
        self._best = math.inf
        self._waited = 0

    def update(self, step: int, value: float) -> bool:
        """Return True if the trial should stop after an evaluation with this value (lower is better)."""
        if value < self._best - self._threshold:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        enough = self._patience is not None and self._waited >= self._patience
        return enough and step >= self._first_step


class DivergenceRule:
    """Detects divergence: a loss or gradient that is not finite, or a loss far above the first one.

    A loss is too high above `threshold` times the first loss, train or eval, in `patience` evaluations
    in a row. axolotl's loss watchdog has an absolute threshold, which fits one vocabulary size only.
    """

    def __init__(self, threshold: float | None, patience: int) -> None:
        self._threshold = threshold
        self._patience = patience
        self._first: float | None = None
        self._high = 0

    def check_training_step(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Return how a logged training step shows divergence, or None."""
        loss = metrics["train/loss"]
        if not math.isfinite(loss):
            return f"train/loss is {loss} at step {step}"
        self._first = loss if self._first is None else self._first
        norm = metrics.get("train/grad_norm", 0.0)
        # fp16's GradScaler finds its scale by overflowing: it skips the step and halves the scale. Only
        # an overflow at a scale below 1 is a divergence
        if not math.isfinite(norm) and metrics.get(LOSS_SCALE, 0.0) < 1:
            return f"train/grad_norm is {norm} at step {step}"
        return None

    def check_evaluation(self, step: int, loss: float) -> str | None:
        """Return how an evaluation shows divergence, or None."""
        if not math.isfinite(loss):
            return f"eval/loss is {loss} at step {step}"
        self._first = loss if self._first is None else self._first
        if self._threshold is None:
            return None
        self._high = self._high + 1 if loss > self._threshold * self._first else 0
        if self._high < self._patience:
            return None
        return (
            f"eval/loss is {loss:.4g} at step {step}, more than {self._threshold:g} times the first "
            f"loss ({self._first:.4g}) in {self._high} evaluations"
        )


class StopRules:
    """All stop rules of one trial, updated after each logged step and each evaluation."""

    def __init__(self, training: TrainingSettings, objective: Objective, total_steps: int) -> None:
        self.stop = False
        """True if early stopping applies."""
        self.diverged: str | None = None
        """Description of the trial's divergence, or None."""
        self._signal = training.early_stopping_metric
        self._objective = objective
        self._average = MovingAverage(training.moving_average_window)
        self._divergence = DivergenceRule(
            training.divergence_threshold, training.divergence_patience
        )
        self._stopping = EarlyStopping(
            training.early_stopping_patience,
            training.early_stopping_threshold,
            training.early_stopping_min_fraction * total_steps,
        )

    def add_training_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update the rules with the metrics of a logged training step."""
        if "train/loss" in metrics:
            self.diverged = self.diverged or self._divergence.check_training_step(step, metrics)

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> float:
        """Update the rules with an evaluation and return the moving average of the loss."""
        loss = metrics["eval/loss"]
        average = self._average.add(loss)
        self.diverged = self.diverged or self._divergence.check_evaluation(step, loss)
        value = metrics[self._objective.metric]
        signals = {
            "objective": -value if self._objective.direction == "maximize" else value,
            "eval/loss": loss,
            "eval/loss_moving_average": average,
        }
        self.stop = self._stopping.update(step, signals[self._signal])
        return average

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Restore the state from the rows that an earlier attempt of the same trial wrote."""
        for row in rows:
            self.add_training_step(row["step"], row)
            if "eval/loss" in row:
                self.add_evaluation(row["step"], row)
