"""The board: what the driver knows of the trials of this run, for whoever draws it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from sweeper.config.settings import Objective, metric_words
from sweeper.config.space import Scalar
from sweeper.core.outcome import Outcome

OPEN = frozenset({"waiting", "running", "cancelled"})
"""States of trials that are still to be trained."""
COUNTED = frozenset({"finished", "early_stopped", "pruned"})
COMPARABLE = COUNTED | {"running", "duplicate"}


@dataclass
class TrialProgress:
    """One trial as the board knows it."""

    key: str
    arm: str
    number: int
    point: Mapping[str, Scalar]
    state: str = "waiting"
    step: int = 0
    total_steps: int = 0
    value: float | None = None
    """Of the metric that pruning goes by, at the last evaluation."""
    best: float | None = None
    """Of the objective; while the trial runs only where that is what pruning goes by."""
    tokens_per_second: float | None = None
    seconds: float | None = None
    """Worker time, once it ended."""
    _since: tuple[float, int] | None = None
    """Time and step of the attempt's first progress."""

    def progressed(
        self, step: int, total_steps: int, tokens_per_second: float, now: float | None = None
    ) -> None:
        """Take note of steps; `now` by time.monotonic."""
        now = time.monotonic() if now is None else now
        if self._since is None or step < self._since[1]:  # a new attempt begins further back
            self._since = (now, step)
        self.step, self.total_steps = step, total_steps
        self.tokens_per_second = tokens_per_second

    def seconds_left(self, now: float | None = None) -> float | None:
        """Until its last step, at the pace so far; None before there is one."""
        now = time.monotonic() if now is None else now
        if self._since is None or self.step <= self._since[1]:
            return None
        pace = (now - self._since[0]) / (self.step - self._since[1])
        return pace * (self.total_steps - self.step)

    def evaluated(self, value: float, objective: Objective) -> None:
        """Take note of an evaluation."""
        self.value = value
        if objective.judged_while_training == objective.metric:
            self.best = value if self.best is None else min(self.best, value, key=objective.order)

    def ended(self, outcome: Outcome) -> None:
        """Take note of the end."""
        self.state = outcome.cause
        self.best = outcome.best_value
        self.seconds = outcome.metrics.get("cost/seconds")

    def summary(self, outcome: Outcome, metric: str) -> str:
        """One line for the log: what was tried, and what it is worth by the objective's metric."""
        values = ", ".join(f"{name}={value}" for name, value in short_names(self.point).items())
        value = outcome.best_value
        result = "" if value is None else f", {metric_words(metric)} {value:.4f}"
        seconds = "" if self.seconds is None else f", {self.seconds:.0f} s"
        reason = "" if outcome.message is None else f" ({outcome.message.splitlines()[-1]})"
        return f"{self.key} {outcome.cause}{result}{seconds}: {values}{reason}"


def short_names(point: Mapping[str, Scalar]) -> dict[str, str]:
    """Values by the last part of their key, as short as they can be read."""
    return {key.rsplit(".", 1)[-1]: format_scalar(value) for key, value in point.items()}


def format_scalar(value: Scalar) -> str:
    """A float with three digits, everything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class StudyProgress:
    """All trials of a run of the driver, by key, in the order they came."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.arm = ""
        self.wanted = 0
        self.base_value: float | None = None
        self.left = ""
        self.note = ""
        """What a person asked for while it runs: paused, stopping."""
        self.trials: dict[str, TrialProgress] = {}

    def open_arm(self, arm: str, wanted: int, base_value: float) -> None:
        """From now on the trials are this arm's."""
        self.arm, self.wanted, self.base_value = arm, wanted, base_value

    def add(self, trial: TrialProgress) -> None:
        """Show a trial."""
        self.trials[trial.key] = trial

    @property
    def best(self) -> TrialProgress | None:
        """The best of the arm that runs, among the trials that may be compared."""
        found = [t for t in self.current() if t.best is not None and t.state in COMPARABLE]
        return min(found, key=lambda trial: self.objective.order(trial.best or 0.0), default=None)

    @property
    def seconds_left(self) -> float | None:
        """Of the arm that runs, by the median trial and the busy workers; None before a trial ended."""
        trials = self.current()
        known = [trial.seconds for trial in trials if trial.seconds and trial.state in COUNTED]
        left = self.wanted - sum(trial.state not in OPEN for trial in trials)
        if not known or left <= 0:
            return None
        busy = sum(trial.state == "running" for trial in trials)
        return statistics.median(known) * left / max(1, busy)

    def current(self) -> list[TrialProgress]:
        """The trials of the arm that runs."""
        return [trial for trial in self.trials.values() if trial.arm == self.arm]


class StudyView(Protocol):
    """Draws. Used as a context manager around the whole study."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def event(self, text: str) -> None:
        """Something happened that a person may want to know later."""

    def update(self, board: StudyProgress) -> None:
        """The board changed."""
