"""What a study may still use, besides n_trials: wall-clock time, device time, patience.

Rules, stated once:
- No trial is started that would not end within the limits, judged by the median of the trials that
  ended; a running trial always ends by itself (its time is spent; Ctrl-C stops at once).
- Arms run one after the other, so each gets the share of what is left that its open trials have among
  all open trials: otherwise the baseline, which comes last, would never be trained.
- wall_clock is counted from the start of this command; device_hours over all runs of the study.

Knows neither Optuna nor workers; the clock is given.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from datetime import time as time_of_day
from zoneinfo import ZoneInfo

from sweeper.settings import Budget, Plateau

Clock = Callable[[], float]
"""Seconds since 1970-01-01 UTC."""


def next_time(text: str, now: float, zone: ZoneInfo | None = None) -> float:
    """The next moment (seconds since 1970) at which clocks of a zone show "HH:MM".

    A time that a change of daylight saving skips is taken as the moment after the gap, one that
    comes twice as the first. zone=None is this machine's.
    """
    today = datetime.fromtimestamp(now, zone).date()
    clock = time_of_day.fromisoformat(text)
    days = (today + timedelta(days=ahead) for ahead in range(3))
    moments = (datetime.combine(day, clock, tzinfo=zone).timestamp() for day in days)
    return next(moment for moment in moments if moment > now)


@dataclass(frozen=True)
class ArmBudget:
    """What one arm may use."""

    deadline: float | None
    device_seconds: float | None
    """Device time of the arm's trials of this run."""
    plateau: Plateau | None
    minimize: bool = True
    clock: Clock = time.time
    ended: list[float] = field(default_factory=list)
    """Seconds that each trial took that ended in this run of the command."""
    devices: int = 1
    """How many each trial occupies."""

    def refusal(
        self, started: Sequence[float], typical: float, values: Sequence[float | None]
    ) -> str | None:
        """Why no further trial may be started, if so.

        Args:
            started: when each running trial was started, seconds since 1970.
            typical: seconds that a trial usually takes, 0 while nobody knows.
            values: what each trial that counts was worth, in order; None if it has no value.
        """
        now = self.clock()
        if self.deadline is not None and now + typical >= self.deadline:
            return "the time is used up"
        if self.device_seconds is not None:
            running = sum(max(typical, now - moment) for moment in started)
            if self.devices * (sum(self.ended) + running + typical) >= self.device_seconds:
                return "the device-hours are used up"
        if self.plateau is not None and plateaued(self.plateau, values, self.minimize):
            return (
                f"the last {self.plateau.trials} trials improved the best by no more than "
                f"{self.plateau.min_improvement}"
            )
        return None

    def left(self, started: Sequence[float]) -> str:
        """What remains, in words; empty without a limit."""
        now = self.clock()
        words = []
        if self.deadline is not None:
            words.append(f"{duration(max(0.0, self.deadline - now))} left")
        if self.device_seconds is not None:
            running = sum(now - moment for moment in started)
            used = self.devices * (sum(self.ended) + running)
            left = max(0.0, self.device_seconds - used)
            words.append(f"{left / 3600:.2f} device-hours left")
        return ", ".join(words)


class StudyBudget:
    """The limits of one run of a study, shared out to its arms as they come."""

    def __init__(
        self,
        settings: Budget,
        minimize: bool,
        clock: Clock = time.time,
        zone: ZoneInfo | None = None,
    ) -> None:
        self._settings = settings
        self._minimize = minimize
        self._clock = clock
        now = clock()
        moments = []
        if settings.wall_clock is not None:
            moments.append(now + settings.wall_clock)
        if settings.until is not None:
            moments.append(next_time(settings.until, now, zone))
        self._deadline = min(moments, default=None)

    def of_arm(self, share: float, device_seconds_spent: float, devices: int = 1) -> ArmBudget:
        """The part of what is left that an arm gets.

        Args:
            share: the arm's open trials over all open trials, 0..1.
            device_seconds_spent: device time of all trials of the study so far.
            devices: how many each of the arm's trials occupies.
        """
        now, hours = self._clock(), self._settings.device_hours
        deadline = None if self._deadline is None else now + share * (self._deadline - now)
        left = None if hours is None else max(0.0, 3600 * hours - device_seconds_spent) * share
        return ArmBudget(
            deadline,
            left,
            self._settings.plateau,
            self._minimize,
            self._clock,
            devices=devices,
        )


def plateaued(rule: Plateau, values: Sequence[float | None], minimize: bool) -> bool:
    """Whether the last `rule.trials` values improved on the best before them by too little."""
    sign = 1.0 if minimize else -1.0
    losses = [None if value is None else sign * value for value in values]
    before = [loss for loss in losses[: -rule.trials] if loss is not None]
    if not before:
        return False
    best = min(loss for loss in losses if loss is not None)
    return min(before) - best <= rule.min_improvement


def typical_seconds(seconds: Sequence[float]) -> float:
    """The median, or 0 while nothing ended."""
    return statistics.median(seconds) if seconds else 0.0


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s"
