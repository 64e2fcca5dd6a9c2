"""Limits of a study besides n_trials: wall-clock time, device time, and a plateau of results.

- No trial is started that would exceed a limit, judged by the median duration of the ended trials.
  A running trial always runs to its end. Ctrl-C stops at once.
- Arms begin one after the other. Each gets the share of the remaining budget that its open trials
  have among all open trials. Otherwise the baseline, which comes last, would never be trained. An arm
  whose last trials still run keeps the device time that they need, and passes the rest on. If it then
  needs more, it comes again after the other arms.
- wall_clock counts from the start of this command, pauses excluded. `until` is a time of day.
  device_hours are counted over all runs of the study.

Durations use a clock that nothing can set. Only `until` follows the wall clock. Both clocks are
arguments, and the module knows neither Optuna nor workers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from datetime import time as time_of_day
from zoneinfo import ZoneInfo

from sweeper.config.settings import BudgetSettings, PlateauRule

Clock = Callable[[], float]
"""A clock in seconds: steady since some moment, or wall-clock since 1970-01-01 UTC."""

NO_DEVICE_HOURS = "the device-hours are used up"
"""The refusal of a trial that device_hours leave no time for."""


def steady() -> float:
    """Return steady seconds that include time asleep. Changes of time or zone do not affect them."""
    # CLOCK_MONOTONIC stops while a Linux machine sleeps, and wall_clock=6h means six hours of the
    # night.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def next_time(text: str, now: float, zone: ZoneInfo | None = None) -> float:
    """Return the next moment (seconds since 1970) at which clocks of a zone show "HH:MM".

    A time that a change of daylight saving skips is taken as the moment after the gap. A time that
    comes twice is taken as its first occurrence. zone=None is the local zone.
    """
    today = datetime.fromtimestamp(now, zone).date()
    clock = time_of_day.fromisoformat(text)
    days = (today + timedelta(days=ahead) for ahead in range(3))
    moments = (datetime.combine(day, clock, tzinfo=zone).timestamp() for day in days)
    return next(moment for moment in moments if moment > now)


@dataclass
class ArmBudget:
    """Budget of one arm."""

    deadline: float | None
    """Steady-clock time at which the arm's budget ends."""
    device_seconds: float | None
    """Device seconds for the arm's trials of this run."""
    plateau: PlateauRule | None
    minimize: bool = True
    clock: Clock = steady
    until: float | None = None
    """Wall-clock time at which the budget ends."""
    wall: Clock = time.time
    ended: list[float] = field(default_factory=list)
    """Seconds of each trial that ended in this run of the command."""
    devices: int = 1
    """Devices that each trial occupies."""

    def paused(self, seconds: float, latest: float | None) -> None:
        """Extend the budget by a pause of `seconds`. `until` moves to `latest` at most."""
        if self.deadline is not None:
            self.deadline += seconds
        if self.until is not None:
            assert latest is not None, "an arm's share of `until` comes from the study's"
            self.until = min(self.until + seconds, latest)

    def refusal(
        self, started: Sequence[float], typical: float, values: Sequence[float | None]
    ) -> str | None:
        """Return the reason why no further trial may be started, or None.

        Args:
            started: steady-clock start of each running trial.
            typical: typical seconds of a trial, 0 while unknown.
            values: the value of each counted trial in order, None where it has none.
        """
        left = self._seconds_left()
        if left is not None and typical >= left:
            return "the time is used up"
        if self.device_seconds is not None:
            used = self._ended() + self._running(started, typical)
            if used + self.devices * typical >= self.device_seconds:
                return NO_DEVICE_HOURS
        if self.plateau is not None and plateaued(self.plateau, values, self.minimize):
            return (
                f"the last {self.plateau.trials} trials improved the best by no more than "
                f"{self.plateau.min_improvement}"
            )
        return None

    def pass_on(self, started: Sequence[float], typical: float) -> float:
        """Keep only the device seconds that the running trials are expected to take, and return them."""
        running = self._running(started, typical)
        if self.device_seconds is not None:
            self.device_seconds = min(self.device_seconds, self._ended() + running)
        return running

    def _ended(self) -> float:
        """Return the device seconds of the trials that ended in this run."""
        return self.devices * sum(self.ended)

    def _running(self, started: Sequence[float], typical: float = 0.0) -> float:
        """Return the device seconds of the running trials, at least `typical` seconds each."""
        now = self.clock()
        return self.devices * sum(max(typical, now - moment) for moment in started)

    def left(self, started: Sequence[float]) -> str:
        """Return the remaining budget as text, or '' when there is no limit."""
        words = []
        if (seconds := self._seconds_left()) is not None:
            words.append(f"{duration(max(0.0, seconds))} left")
        if self.device_seconds is not None:
            used = self._ended() + self._running(started)
            left = max(0.0, self.device_seconds - used)
            words.append(f"{left / 3600:.2f} device-hours left")
        return ", ".join(words)

    def _seconds_left(self) -> float | None:
        ends = ((self.deadline, self.clock), (self.until, self.wall))
        return min((end - clock() for end, clock in ends if end is not None), default=None)


class StudyBudget:
    """Budget of one run of a study, distributed to its arms as they begin."""

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
        self._parts: list[ArmBudget] = []

    def of_arm(self, share: float, device_seconds_spent: float, devices: int = 1) -> ArmBudget:
        """Return the part of the remaining budget that an arm gets.

        Args:
            share: the arm's open trials over all open trials, 0..1.
            device_seconds_spent: device seconds of all trials of the study so far, and those that the
                running trials of other arms are expected to take.
            devices: devices that each of the arm's trials occupies.
        """
        hours = self._settings.device_hours
        left = None if hours is None else max(0.0, 3600 * hours - device_seconds_spent) * share
        part = ArmBudget(
            deadline=_part(share, self._clock(), self._deadline),
            device_seconds=left,
            plateau=self._settings.plateau,
            minimize=self._minimize,
            clock=self._clock,
            until=_part(share, self._wall(), self._until),
            wall=self._wall,
            devices=devices,
        )
        self._parts.append(part)
        return part

    def seconds_over(self) -> float:
        """Return the seconds since the end of the study's time: negative before, -inf without one."""
        ends = ((self._deadline, self._clock), (self._until, self._wall))
        return max((clock() - end for end, clock in ends if end is not None), default=-math.inf)

    def paused(self, seconds: float) -> None:
        """Exclude a pause of the study from its wall-clock time."""
        if self._deadline is not None:
            # `until` stays where it is: a pause does not move the time of day
            self._deadline += seconds
        for part in self._parts:
            part.paused(seconds, self._until)


def _part(share: float, now: float, end: float | None) -> float | None:
    return None if end is None else now + share * (end - now)


def plateaued(rule: PlateauRule, values: Sequence[float | None], minimize: bool) -> bool:
    """Return True if the last `rule.trials` values improved too little on the best before them."""
    sign = 1.0 if minimize else -1.0
    losses = [None if value is None else sign * value for value in values]
    before = [loss for loss in losses[: -rule.trials] if loss is not None]
    if not before:
        return False
    best = min(loss for loss in losses if loss is not None)
    return min(before) - best <= rule.min_improvement


def typical_seconds(seconds: Sequence[float]) -> float:
    """Return the median, or 0 if no trial has ended."""
    return statistics.median(seconds) if seconds else 0.0


def duration(seconds: float) -> str:
    """Format seconds as hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s"
