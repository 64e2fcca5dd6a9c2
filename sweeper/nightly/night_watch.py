"""Tell a monitor when each set last ran. A night that never fired leaves no trace of its own.

Reads the record of nights and the status of the study that a night runs. Writes nothing.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, date, datetime, timedelta

from pydantic import ValidationError

from sweeper.core.errors import StudyError
from sweeper.core.paths import NightFolder, NightsFolder, StudyFolder
from sweeper.core.stored_files import damage
from sweeper.core.value import FrozenValue
from sweeper.nightly.night_record import ENDED, read_record
from sweeper.nightly.nightly_set import SET_NAME
from sweeper.reporting.study_status import StudyStatus, is_locked
from sweeper.reporting.text_table import duration

SILENT_SECONDS = 60.0
"""Age of a running study's status from which its driver waits: it writes one every two seconds."""
_LATEST = (
    "SELECT set_name, local_date, starts, started_at, ended_at, result FROM nights "
    "WHERE (set_name, local_date) IN (SELECT set_name, MAX(local_date) FROM nights GROUP BY set_name)"
)


class SetStatus(FrozenValue):
    """The latest night of one set."""

    set_name: str
    date: str | None = None
    """Local date of the night, or None if the set never ran."""
    started: datetime | None = None
    ended: datetime | None = None
    result: str | None = None
    running: bool = False
    """True if a process runs the set now."""
    waiting: str | None = None
    """What the night's study waits for, or None."""
    age_seconds: float | None = None
    """Seconds since the night's first start."""
    late: bool = False
    """True if no night has started within the wanted age, or the latest was left unfinished."""

    def __str__(self) -> str:
        """Return the status as a line."""
        if self.date is None or self.age_seconds is None:
            return f"{self.set_name}: LATE, no night has ever run"
        ended = f"ended: {self.result}" if self.ended else "killed before its end"
        state = "running" if self.running else ended
        waits = f" and waiting: {self.waiting}" if self.waiting else ""
        late = "LATE, " if self.late else ""
        ago = duration(self.age_seconds)
        return f"{self.set_name}: {late}night of {self.date}, started {ago} ago, {state}{waits}"


def set_statuses(
    nights: NightsFolder, names: Sequence[str], max_age: timedelta | None, now: datetime
) -> list[SetStatus]:
    """Return the latest night of each set.

    Args:
        nights: the folder of all nights.
        names: the sets. Empty means all that ever ran.
        max_age: age of the latest start from which a set is late. None means never.
        now: the current time.

    Raises:
        StudyError: the record of nights cannot be read.
    """
    found = {row[0]: _status(nights, row, max_age, now) for row in _latest(nights)}
    never = {name: SetStatus(set_name=name, late=True) for name in names if name not in found}
    return [
        status for name, status in sorted({**found, **never}.items()) if not names or name in names
    ]


def _latest(nights: NightsFolder) -> list[tuple[str, str, int, str, str | None, str | None]]:
    if not nights.database.exists():
        return []
    try:
        # SQLite opens a file that cannot be written for reading alone
        with closing(sqlite3.connect(nights.database, timeout=5)) as database:
            return database.execute(_LATEST).fetchall()
    except sqlite3.Error as error:
        raise StudyError(
            f"{nights.database} cannot be read ({error}). If it is damaged, move it away: the nights of "
            "today may then run again, and their records stay"
        ) from None


def _status(
    nights: NightsFolder,
    row: tuple[str, str, int, str, str | None, str | None],
    max_age: timedelta | None,
    now: datetime,
) -> SetStatus:
    name, night, _, started_at, ended_at, result = row
    try:
        _require_names(name, night)
        started = datetime.fromisoformat(started_at)
        ended = None if ended_at is None else datetime.fromisoformat(ended_at)
    except ValueError as error:
        raise StudyError(f"{nights.database}: {damage(error)}") from None
    running = is_locked(nights.lock(name))
    # a clock that was set back must not make a night look young for ever
    age = abs((now - started.astimezone(UTC)).total_seconds())
    late = (max_age is not None and age > max_age.total_seconds()) or not (running or ended)
    return SetStatus(
        set_name=name,
        date=night,
        started=started,
        ended=ended,
        result=result,
        running=running,
        waiting=_waiting(nights, nights.night(name, night)) if running else None,
        age_seconds=age,
        late=late,
    )


def _require_names(set_name: str, local_date: str) -> None:
    """Refuse a row whose set or date cannot be the name of a folder.

    Raises:
        ValueError: names what is wrong.
    """
    if not re.fullmatch(SET_NAME, set_name):
        raise ValueError(f"{set_name!r} is no name of a set")
    date.fromisoformat(local_date)


def _waiting(nights: NightsFolder, night: NightFolder) -> str | None:
    """Return what the study that a night runs waits for, or None."""
    try:
        record = read_record(night)
    except StudyError:
        return None
    open_ones = (
        [] if record is None else [e for e in record.entries.values() if e.status not in ENDED]
    )
    for entry in open_ones:
        if entry.decided is not None:
            return _wait_of(StudyFolder(nights.path.parent / entry.decided.study_name))
    return None


def _wait_of(study: StudyFolder) -> str | None:
    try:
        status = StudyStatus.model_validate_json(study.standing.read_bytes())
        silent = time.time() - study.standing.stat().st_mtime
    except (OSError, ValidationError):
        return None
    name = status.study_name
    if status.state == "paused":
        return f"study {name} is paused (sweeper study resume {name})"
    if status.state in ("running", "starting", "stopping") and silent > SILENT_SECONDS:
        return f"study {name} has been silent for {duration(silent)}: its database or disk is away"
    return None
