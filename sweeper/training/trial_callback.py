"""The callback that connects the training loop to the worker: metrics out, stop requests in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sweeper.core.errors import TrialDiverged
from sweeper.core.outcome import StopCause
from sweeper.core.spool import MetricsSpool
from sweeper.core.stage_words import report
from sweeper.training.observer import TrialObserver
from sweeper.training.outcome_metrics import MOVING_AVERAGE
from sweeper.training.stop_rules import LOSS_SCALE, StopRules
from sweeper.training.trial_costs import TrialCosts

PROGRESS_SECONDS = 0.5
"""Seconds between two progress reports."""
TRAIN_METRICS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "loss_scale": LOSS_SCALE,
}


@dataclass
class TrialCallback(TrainerCallback):  # type: ignore[misc]
    """Writes metrics to the spool, reports to the observer and applies the stop rules."""

    observer: TrialObserver
    spool: MetricsSpool
    rules: StopRules
    costs: TrialCosts
    total_steps: int
    pruning_metric: str
    """Name of the metric used for pruning."""
    stopped: StopCause | None = None
    """Cause of a stop that the observer requested."""
    _last_progress: float = field(default=0.0, init=False)
    _loss: float | None = field(default=None, init=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.costs.steps = state.global_step
        if state.global_step >= self.total_steps:
            # The last step is logged, evaluated and saved whatever logging_steps and save_steps are
            control.should_log = control.should_evaluate = control.should_save = True
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            rate = self.costs.tokens_per_second
            self.observer.progress(state.global_step, self.total_steps, rate)
            loss = "" if self._loss is None else f", loss {self._loss:.2f}"
            report(f"step {state.global_step} of {self.total_steps}{loss}")
        self._pass_on_stop(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: Any,
    ) -> None:
        metrics = {TRAIN_METRICS[name]: logs[name] for name in TRAIN_METRICS if name in logs}
        if "train/loss" not in metrics:
            return  # transformers' summary at the end of training, not a step
        self._loss = metrics["train/loss"]
        self.spool.write(state.global_step, metrics)
        self.rules.add_training_step(state.global_step, metrics)
        self._raise_if_diverged()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        # Names without a slash are transformers' copies, such as the objective for the best checkpoint
        named = {name: value for name, value in metrics.items() if "/" in name}
        average = self.rules.add_evaluation(state.global_step, named)
        self.spool.write(state.global_step, {**named, MOVING_AVERAGE: average})
        self._raise_if_diverged()
        if self.pruning_metric in named:  # a user's metric may have failed
            value = named[self.pruning_metric]
            self.observer.evaluated(state.global_step, self.total_steps, value)
        self._pass_on_stop(control)

    def _pass_on_stop(self, control: TrainerControl) -> None:
        # the newest one: a trial that was to be paused may be pruned at the evaluation after this step
        self.stopped = self.observer.stop_cause() or self.stopped
        if self.stopped or self.rules.stop:
            control.should_training_stop = True
        if self.stopped == "cancelled":
            control.should_save = True  # a resumed study continues the trial from this checkpoint

    def _raise_if_diverged(self) -> None:
        if self.rules.diverged:
            raise TrialDiverged(self.rules.diverged)
