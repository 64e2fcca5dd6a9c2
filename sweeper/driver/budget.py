"""What a study may still use, besides n_trials: wall-clock time, device time, patience.

Rules, stated once:
- No trial is started that would not end within the limits, judged by the median of the trials that
  ended; a running trial always ends by itself (its time is spent; Ctrl-C stops at once).
- Arms run one after the other, so each gets the share of what is left that its open trials have among
  all open trials: otherwise the baseline, which comes last, would never be trained.
- wall_clock is counted from the start of this command, without the time it was paused; `until` is a
  time of day, whatever happens; device_hours are counted over all runs of the study.

Durations are measured by a clock that nobody sets; only `until` goes by the clock on the wall. Knows
neither Optuna nor workers; both clocks are given.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from datetime import time as time_of_day
from zoneinfo import ZoneInfo

from sweeper.config.settings import BudgetSettings, PlateauRule

Clock = Callable[[], float]
"""Seconds: of a steady clock since some moment, of a wall clock since 1970-01-01 UTC."""


def steady() -> float:
    """Seconds that pass, also while the machine sleeps; no change of time or zone moves them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


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


@dataclass
class ArmBudget:
    """What one arm may use."""

    deadline: float | None
    """By the steady clock."""
    device_seconds: float | None
    """Device time of the arm's trials of this run."""
    plateau: PlateauRule | None
    minimize: bool = True
    clock: Clock = steady
    until: float | None = None
    """By the wall clock."""
    wall: Clock = time.time
    ended: list[float] = field(default_factory=list)
    """Seconds that each trial took that ended in this run of the command."""
    devices: int = 1
    """How many each trial occupies."""

    def paused(self, seconds: float, latest: float | None) -> None:
        """Time that passed while nothing was to be done; `until` moves to `latest` at most."""
        if self.deadline is not None:
            self.deadline += seconds
        if self.until is not None:
            assert latest is not None, "an arm's share of `until` comes from the study's"
            self.until = min(self.until + seconds, latest)

    def refusal(
        self, started: Sequence[float], typical: float, values: Sequence[float | None]
    ) -> str | None:
        """Why no further trial may be started, if so.

        Args:
            started: when each running trial was started, by the steady clock.
            typical: seconds that a trial usually takes, 0 while nobody knows.
            values: what each trial that counts was worth, in order; None if it has no value.
        """
        now, left = self.clock(), self._seconds_left()
        if left is not None and typical >= left:
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
        if (seconds := self._seconds_left()) is not None:
            words.append(f"{duration(max(0.0, seconds))} left")
        if self.device_seconds is not None:
            running = sum(now - moment for moment in started)
            used = self.devices * (sum(self.ended) + running)
            left = max(0.0, self.device_seconds - used)
            words.append(f"{left / 3600:.2f} device-hours left")
        return ", ".join(words)

    def _seconds_left(self) -> float | None:
        ends = ((self.deadline, self.clock), (self.until, self.wall))
        return min((end - clock() for end, clock in ends if end is not None), default=None)


class StudyBudget:
    """The limits of one run of a study, shared out to its arms as they come."""

    def __init__(
        self,
        settings: BudgetSettings,
        minimize: bool,
        clock: Clock = steady,
        wall: Clock = time.time,
        zone: ZoneInfo | None = None,
    ) -> None:
        self._settings = settings
        self._minimize = minimize
        self._clock = clock
        self._wall = wall
        limit, until = settings.wall_clock, settings.until
        self._deadline = None if limit is None else clock() + limit
        self._until = None if until is None else next_time(until, wall(), zone)
        self._arm: ArmBudget | None = None

    def of_arm(self, share: float, device_seconds_spent: float, devices: int = 1) -> ArmBudget:
        """The part of what is left that an arm gets.

        Args:
            share: the arm's open trials over all open trials, 0..1.
            device_seconds_spent: device time of all trials of the study so far.
            devices: how many each of the arm's trials occupies.
        """
        hours = self._settings.device_hours
        left = None if hours is None else max(0.0, 3600 * hours - device_seconds_spent) * share
        self._arm = ArmBudget(
            deadline=_part(share, self._clock(), self._deadline),
            device_seconds=left,
            plateau=self._settings.plateau,
            minimize=self._minimize,
            clock=self._clock,
            until=_part(share, self._wall(), self._until),
            wall=self._wall,
            devices=devices,
        )
        return self._arm

    def paused(self, seconds: float) -> None:
        """Time that passed while the study was paused: it is not counted as wall-clock time."""
        if self._deadline is not None:
            self._deadline += seconds
        if self._arm is not None:
            self._arm.paused(seconds, self._until)


def _part(share: float, now: float, end: float | None) -> float | None:
    return None if end is None else now + share * (end - now)


def plateaued(rule: PlateauRule, values: Sequence[float | None], minimize: bool) -> bool:
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
