"""Which night it is: local dates and windows, whatever the clock change does.

Pure arithmetic on instants; whoever calls brings the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

LONGEST_WINDOW = timedelta(hours=22)
"""Nights may never overlap, also not on the day of 23 hours, with an hour to spare."""


@dataclass(frozen=True)
class Night:
    """One night of a set: named by the local date on which it begins."""

    date: date
    begins: datetime
    """An instant, in UTC."""
    ends: datetime
    """When it is too late to start or go on, in UTC."""


@dataclass(frozen=True)
class NightTimes:
    """When the nights of a set are."""

    time_zone: ZoneInfo
    begins: time
    """Local wall-clock time; one that the clock change skips is taken an hour later."""
    window: timedelta
    """How long after its beginning a night may still start: late schedulers, hosts that slept."""

    def __post_init__(self) -> None:
        if not timedelta(0) < self.window <= LONGEST_WINDOW:
            raise ValueError(f"window={self.window}: give more than 0 and at most {LONGEST_WINDOW}")

    def night(self, on: date) -> Night:
        """The night that begins on a local date."""
        begins = datetime.combine(on, self.begins, self.time_zone).astimezone(UTC)
        return Night(on, begins, begins + self.window)

    def at(self, now: datetime) -> Night | None:
        """The night an instant lies in; None between two nights."""
        today = now.astimezone(self.time_zone).date()
        # a night that began yesterday may last past midnight
        for on in (today, today - timedelta(days=1)):
            night = self.night(on)
            if night.begins <= now < night.ends:
                return night
        return None

    def next_after(self, now: datetime) -> Night:
        """The first night that begins after an instant."""
        today = now.astimezone(self.time_zone).date()
        nights = (self.night(today + timedelta(days=ahead)) for ahead in range(3))
        return next(night for night in nights if night.begins > now)
