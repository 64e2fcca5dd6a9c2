"""The progress of a run's trials, as the driver fills it in and a view draws it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self, cast

from sweeper.config.settings import Objective, metric_words
from sweeper.config.space import Scalar
from sweeper.core.outcome import Cause, Outcome
from sweeper.search.states import STATES, uses_budget


@dataclass
class TrialProgress:
    """The progress of one trial."""

    key: str
    arm: str
    number: int
    point: Mapping[str, Scalar]
    state: Literal["waiting", "running", "paused"] | Cause = "waiting"
    """The cause once the trial has ended."""
    step: int = 0
    total_steps: int = 0
    value: float | None = None
    """The last evaluation, of the metric that pruning goes by."""
    best: float | None = None
    """The objective's best value. A running trial has one only if pruning goes by the objective."""
    tokens_per_second: float | None = None
    seconds: float | None = None
    """Worker time, once the trial has ended."""
    ending: str = ""
    """How the trial ended and, for a value of a sample, how many rows that has. Empty before."""
    uses_budget: bool = False
    """True once the trial has ended as one of n_trials."""
    _since: tuple[float, int] | None = None
    """Time and step of the attempt's first progress."""

    @property
    def ended(self) -> bool:
        """True once the trial has an outcome."""
        return self.state in STATES

    @property
    def comparable(self) -> bool:
        """True if the trial's best value may be compared: it has not ended, or ended well."""
        return not self.ended or STATES[cast(Cause, self.state)].comparable

    @property
    def complete(self) -> bool:
        """True once the trial has run to its own end."""
        return self.ended and STATES[cast(Cause, self.state)].complete

    def progressed(
        self, step: int, total_steps: int, tokens_per_second: float, now: float | None = None
    ) -> None:
        """Record progress. `now` is a reading of time.monotonic."""
        now = time.monotonic() if now is None else now
        if self._since is None or step < self._since[1]:  # a new attempt begins further back
            self._since = (now, step)
        self.step, self.total_steps = step, total_steps
        self.tokens_per_second = tokens_per_second

    def stand_still(self, *, paused: bool) -> None:
        """Record that the trial waits for a worker. Its wait is no part of its pace."""
        self.state, self._since = "paused" if paused else "waiting", None

    def seconds_left(self, now: float | None = None) -> float | None:
        """Return the seconds until the last step at the pace so far, or None before there is a pace."""
        now = time.monotonic() if now is None else now
        if self._since is None or self.step <= self._since[1]:
            return None
        pace = (now - self._since[0]) / (self.step - self._since[1])
        return pace * (self.total_steps - self.step)

    def evaluated(self, value: float, objective: Objective) -> None:
        """Record an evaluation."""
        self.value = value
        if objective.judged_while_training == objective.metric:
            self.best = value if self.best is None else min(self.best, value, key=objective.order)

    def end(self, outcome: Outcome) -> None:
        """Record the outcome."""
        self.state, self.ending = outcome.cause, outcome.ending
        self.uses_budget = uses_budget(outcome)
        self.best = outcome.best_value
        self.seconds = outcome.metrics.get("cost/seconds")

    def summary(self, outcome: Outcome, metric: str) -> str:
        """Return one line for the log: the result by the objective's metric, and the point."""
        values = ", ".join(f"{name}={value}" for name, value in short_names(self.point).items())
        value = outcome.best_value
        result = "" if value is None else f", {metric_words(metric)} {value:.4f}"
        seconds = "" if self.seconds is None else f", {self.seconds:.0f} s"
        reason = "" if outcome.message is None else f" ({outcome.message.splitlines()[-1]})"
        return f"{self.key} {outcome.ending}{result}{seconds}: {values}{reason}"


def short_names(point: Mapping[str, Scalar]) -> dict[str, str]:
    """Return the values as short texts, by the last part of their keys."""
    return {key.rsplit(".", 1)[-1]: format_scalar(value) for key, value in point.items()}


def format_scalar(value: Scalar) -> str:
    """Return a float with three digits, everything else unchanged."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class StudyProgress:
    """All trials of a run of the driver, by key, in the order in which they were added."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.arm = ""
        self.wanted = 0
        self.base_value: float | None = None
        self.left = ""
        self.note = ""
        """"paused" or "stopping" while a person has asked for it, else ""."""
        self.trials: dict[str, TrialProgress] = {}

    def open_arm(self, arm: str, wanted: int, base_value: float) -> None:
        """Show this arm from now on."""
        self.arm, self.wanted, self.base_value = arm, wanted, base_value

    def want(self, arm: str, total: int) -> None:
        """Show another total of an arm, if it is the one that is shown."""
        if arm == self.arm:
            self.wanted = total

    def add(self, trial: TrialProgress) -> None:
        """Add a trial, or replace the one of the same key."""
        self.trials[trial.key] = trial

    @property
    def best(self) -> TrialProgress | None:
        """The best trial of the current arm, among those that may be compared."""
        found = [t for t in self.current() if t.best is not None and t.comparable]
        # Looks are at a sample, so they do not compare with values of the whole split
        whole = [trial for trial in found if trial.complete]
        return min(
            whole or found, key=lambda trial: self.objective.order(trial.best or 0.0), default=None
        )

    @property
    def done(self) -> int:
        """The trials of the current arm that use up one of n_trials, as in `study show`."""
        return sum(trial.uses_budget for trial in self.current())

    @property
    def seconds_left(self) -> float | None:
        """Time left for the current arm, by its median trial and busy workers.

        None before a trial has ended.
        """
        trials = self.current()
        ended = [trial for trial in trials if trial.uses_budget and trial.comparable]
        known = [trial.seconds for trial in ended if trial.seconds]
        left = self.wanted - self.done
        if not known or left <= 0:
            return None
        busy = sum(trial.state == "running" for trial in trials)
        return statistics.median(known) * left / max(1, busy)

    def current(self) -> list[TrialProgress]:
        """Return the trials of the current arm."""
        return [trial for trial in self.trials.values() if trial.arm == self.arm]

    def elsewhere(self) -> list[TrialProgress]:
        """Return the trials of other arms that have not ended: the last ones of the arm before."""
        return [t for t in self.trials.values() if t.arm != self.arm and not t.ended]


class StudyView(Protocol):
    """Shows a study to a person. Used as a context manager around the whole run."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def event(self, text: str) -> None:
        """Show a sentence that a person may want to read later."""

    def update(self, board: StudyProgress) -> None:
        """Show the board's new state."""
