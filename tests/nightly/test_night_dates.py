"""Every local date has one night, in every time zone, through both clock changes."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from itertools import cycle, pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from sweeper.core.paths import NightsFolder
from sweeper.nightly.night_claims import NightLog, NightTaken
from sweeper.nightly.night_dates import NightTimes

ZONES = (
    *("Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"),
    *("Pacific/Apia", "Africa/Casablanca", "America/Santiago", "UTC"),
)
NIGHTS = 400
FIRST = date(2026, 1, 15)


def _rhythm(zone: str, begins: time, hours: float = 10) -> NightTimes:
    return NightTimes(ZoneInfo(zone), begins, timedelta(hours=hours))


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("begins", [time(22, 0), time(2, 30), time(0, 0)])
def test_nights_never_overlap_and_come_daily(zone: str, begins: time) -> None:
    """400 dates in a row: each begins 22 to 26 hours after the last, and ends before the next."""
    rhythm = _rhythm(zone, begins, 22)
    nights = [rhythm.night(FIRST + timedelta(days=day)) for day in range(NIGHTS)]
    for before, after in pairwise(nights):
        assert timedelta(hours=22) <= after.begins - before.begins <= timedelta(hours=26)
        assert before.ends <= after.begins


class UnsyncedNights(NightLog):
    """The same rows through one connection that does not wait for the disk: 1,600 claims in seconds."""

    def __init__(self, folder: NightsFolder) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        self._kept = sqlite3.connect(folder.database)
        self._kept.execute("PRAGMA synchronous = OFF")
        super().__init__(folder)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with self._kept:
            yield self._kept


@pytest.mark.parametrize(
    ("zone", "begins"),
    [
        # an hour that is skipped in the one, half an hour in the other
        ("Europe/Berlin", time(22, 0)),
        ("Australia/Lord_Howe", time(2, 30)),
        *(
            pytest.param(zone, begins, marks=pytest.mark.slow)
            for zone, begins in zip(ZONES, cycle([time(22, 0), time(2, 30)]), strict=False)
            if zone not in ("Europe/Berlin", "Australia/Lord_Howe")
        ),
    ],
)
def test_each_local_date_runs_exactly_once(zone: str, begins: time, tmp_path: Path) -> None:
    """A scheduler that fires early, late, twice or again after hours runs each of 400 nights once."""
    rhythm, chance = _rhythm(zone, begins), random.Random(zone)
    nights = UnsyncedNights(NightsFolder(tmp_path))
    ran: Counter[date] = Counter()
    for day in range(NIGHTS):
        begin = rhythm.night(FIRST + timedelta(days=day)).begins
        minutes = [-5, chance.randrange(0, 599), 0, chance.randrange(0, 599), 720]
        for minute in minutes[: chance.randrange(3, 6)]:
            now = begin + timedelta(minutes=minute)
            night = rhythm.at(now)
            if night is None:
                continue
            try:
                with nights.claim("set", night.date, now) as claim:
                    ran[claim.date] += 1
                    nights.end(claim, "no change", now)
            except NightTaken:
                pass
    assert ran == Counter({FIRST + timedelta(days=day): 1 for day in range(NIGHTS)})


def test_skipped_wall_clock_time_is_an_hour_later() -> None:
    """02:30 does not exist in Berlin on 29 March 2026: the night begins at 03:30 summer time."""
    night = _rhythm("Europe/Berlin", time(2, 30)).night(date(2026, 3, 29))
    assert night.begins == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)


def test_repeated_wall_clock_time_is_its_first() -> None:
    """02:30 comes twice in Berlin on 25 October 2026: the night begins at the first, summer time."""
    night = _rhythm("Europe/Berlin", time(2, 30)).night(date(2026, 10, 25))
    assert night.begins == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)


def test_host_that_slept_runs_the_missed_night_within_its_window() -> None:
    """At 07:00 the night of yesterday 22:00 is still on; at 09:00 it is over."""
    rhythm = _rhythm("UTC", time(22, 0))
    night = rhythm.at(datetime(2026, 5, 2, 7, tzinfo=UTC))
    assert night is not None
    assert night.date == date(2026, 5, 1)
    assert rhythm.at(datetime(2026, 5, 2, 9, tzinfo=UTC)) is None
    assert rhythm.next_after(datetime(2026, 5, 2, 9, tzinfo=UTC)).date == date(2026, 5, 2)


def test_windows_that_could_overlap_are_refused() -> None:
    """23 hours of window would reach into the next night on the day of 23 hours."""
    with pytest.raises(ValueError, match="at most 22:00:00"):
        _rhythm("UTC", time(22, 0), 23)


def test_crashed_night_goes_on_and_ends_once(tmp_path: Path) -> None:
    """A night whose process died is claimed again, as its second start; an ended one never."""
    nights, on, now = (
        NightLog(NightsFolder(tmp_path)),
        date(2026, 5, 1),
        datetime(2026, 5, 1, 22, tzinfo=UTC),
    )
    with pytest.raises(RuntimeError, match="power cut"), nights.claim("set", on, now):
        raise RuntimeError("power cut")
    assert nights.result("set", on) is None
    with nights.claim("set", on, now) as claim:
        assert claim.starts == 2
        nights.end(claim, "new champion", now)
    assert nights.result("set", on) == "new champion"
    with pytest.raises(NightTaken, match="run already"), nights.claim("set", on, now):
        pass


def _try(folder: Path, queue: multiprocessing.Queue[str]) -> None:
    now = datetime(2026, 5, 1, 22, tzinfo=UTC)
    nights = NightLog(NightsFolder(folder))
    try:
        with nights.claim("set", date(2026, 5, 1), now) as claim:
            queue.put("ran")
            nights.end(claim, "no change", now)
    except NightTaken as reason:
        queue.put(str(reason))


def test_two_schedulers_at_once_one_runs_the_other_says_so(tmp_path: Path) -> None:
    """Of six processes that fire together one runs; each of the others has a reason."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_try, args=(tmp_path, queue)) for _ in range(6)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert said.count("ran") == 1
    assert all("nightly set" in words for words in said if words != "ran")
