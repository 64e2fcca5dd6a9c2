"""Local dates and time windows of nights, correct across clock changes.

The functions take the current time as an argument and read no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

LONGEST_WINDOW = timedelta(hours=22)
"""Longest window. Nights must not overlap, even on a day of 23 hours, with an hour to spare."""


@dataclass(frozen=True)
class Night:
    """One night of a set, named by the local date on which it begins."""

    date: date
    begins: datetime
    """Time of the beginning in UTC."""
    ends: datetime
    """End of the window in UTC, after which the night neither starts nor continues."""


@dataclass(frozen=True)
class NightTimes:
    """The time zone, the beginning and the window of a set's nights."""

    time_zone: ZoneInfo
    begins: time
    """Local wall-clock time. A time that the clock change skips means one hour later."""
    window: timedelta
    """Time in which a night may still start, for late schedulers and for hosts that slept."""

    def __post_init__(self) -> None:
        if not timedelta(0) < self.window <= LONGEST_WINDOW:
            raise ValueError(f"window={self.window}: give more than 0 and at most {LONGEST_WINDOW}")

    def night(self, on: date) -> Night:
        """Return the night that begins on a local date."""
        # astimezone takes the first of two equal wall-clock times, and moves a skipped one an hour on.
        begins = datetime.combine(on, self.begins, self.time_zone).astimezone(UTC)
        return Night(on, begins, begins + self.window)

    def at(self, now: datetime) -> Night | None:
        """Return the night at a given time, or None between two nights."""
        today = now.astimezone(self.time_zone).date()
        # a night that began yesterday may last past midnight
        for on in (today, today - timedelta(days=1)):
            night = self.night(on)
            if night.begins <= now < night.ends:
                return night
        return None

    def next_after(self, now: datetime) -> Night:
        """Return the first night that begins after a given time."""
        today = now.astimezone(self.time_zone).date()
        # Tonight may already have begun, and a clock change may shift it to another day.
        nights = (self.night(today + timedelta(days=ahead)) for ahead in range(3))
        return next(night for night in nights if night.begins > now)
