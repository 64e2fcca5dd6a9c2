"""When a running trial shall stop by itself: no more improvement, or divergence.

Sees losses by step and nothing else, so that a resumed trial can be brought to the same state by
showing it the rows that the earlier attempt wrote.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from sweeper.config.settings import Objective, TrainingSettings

LOSS_SCALE = "train/loss_scale"
"""fp16's loss scale; a row has it only where gradients are scaled."""


class MovingAverage:
    """The mean of the last `window` values, of fewer at the start."""

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """The average with `value` as its newest."""
        self._values.append(value)
        return sum(self._values) / len(self._values)


class EarlyStopping:
    """Stop after `patience` evaluations in a row without an improvement of more than `threshold`.

    The improvement is over the last value that counted as one, so that many small steps add up
    (transformers' EarlyStoppingCallback forgets them). Before `first_step` nothing is stopped, but
    evaluations count.
    """

    def __init__(self, patience: int | None, threshold: float, first_step: float) -> None:
        self._patience = patience
        self._threshold = threshold
        self._first_step = first_step
        self._best = math.inf
        self._waited = 0

    def update(self, step: int, value: float) -> bool:
        """Whether to stop now."""
        if value < self._best - self._threshold:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        enough = self._patience is not None and self._waited >= self._patience
        return enough and step >= self._first_step


class DivergenceRule:
    """Finds what no later step repairs: a loss or gradient that is not finite, or a loss far off.

    Far off is `threshold` times the first loss, train or eval, in `patience` evaluations in a row
    (axolotl's loss watchdog, made relative so that it holds for every vocabulary).
    """

    def __init__(self, threshold: float | None, patience: int) -> None:
        self._threshold = threshold
        self._patience = patience
        self._first: float | None = None
        self._high = 0

    def trained(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with a logged training step, or None.

        Under fp16 an overflow of the gradient is how the loss scale is found: the step is skipped
        and the scale halved. It counts once the scale has fallen below 1.
        """
        loss = metrics["train/loss"]
        if not math.isfinite(loss):
            return f"train/loss is {loss} at step {step}"
        self._first = self._first or loss
        norm = metrics.get("train/grad_norm", 0.0)
        if not math.isfinite(norm) and metrics.get(LOSS_SCALE, 0.0) < 1:
            return f"train/grad_norm is {norm} at step {step}"
        return None

    def evaluated(self, step: int, loss: float) -> str | None:
        """What is wrong with an evaluation, or None."""
        if not math.isfinite(loss):
            return f"eval/loss is {loss} at step {step}"
        self._first = self._first or loss
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
    """All rules over one trial: what to do after each logged step and each evaluation."""

    def __init__(self, training: TrainingSettings, objective: Objective, total_steps: int) -> None:
        self.stop = False
        """No improvement for long enough."""
        self.diverged: str | None = None
        """Why the trial cannot go on, as a sentence."""
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

    def trained(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a logged training step."""
        if "train/loss" in metrics:
            self.diverged = self.diverged or self._divergence.trained(step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> float:
        """Take in an evaluation; the moving average of its loss comes back."""
        loss = metrics["eval/loss"]
        average = self._average.add(loss)
        self.diverged = self.diverged or self._divergence.evaluated(step, loss)
        value = metrics[self._objective.metric]
        signals = {
            "objective": -value if self._objective.direction == "maximize" else value,
            "eval/loss": loss,
            "eval/loss_moving_average": average,
        }
        self.stop = self._stopping.update(step, signals[self._signal])
        return average

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in what an earlier attempt of the same trial wrote."""
        for row in rows:
            self.trained(row["step"], row)
            if "eval/loss" in row:
                self.evaluated(row["step"], row)
