"""Claims that let each night run exactly once.

A database row per set and local date records that a night ran and how it ended. A file lock, which the
operating system releases when its process dies, shows that a night is running. A scheduler may start a
night twice, late, or after a crash: the first process that locks an unfinished night runs it.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from os import getpid

from filelock import FileLock, Timeout

from sweeper.core.errors import StudyError, SweeperError
from sweeper.core.paths import NightsFolder, write_json
from sweeper.core.stored_files import read_object

BUSY_SECONDS = 60.0
"""Seconds to wait for another process's transaction."""

# A database row is safe against two starts at once, which a file would have to be locked for.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS nights (
    set_name TEXT NOT NULL,
    local_date TEXT NOT NULL,
    starts INTEGER NOT NULL,
    started_at TEXT NOT NULL,
    ended_at TEXT,
    result TEXT,
    PRIMARY KEY (set_name, local_date)
)
"""


class NightTaken(SweeperError):
    """The set is running in another process, or this night has already run."""


@dataclass(frozen=True)
class NightClaim:
    """The right to run one night, held within a `with` block."""

    set_name: str
    date: date
    starts: int
    """Number of starts: 1, or more after a crash."""
    began: datetime
    """Time of the first start, from which the night's wall-clock budget counts."""


@dataclass(frozen=True)
class LockHolder:
    """The process that runs a set now."""

    process: int
    date: date


class NightLog:
    """The record of all nights under one folder."""

    def __init__(self, folder: NightsFolder) -> None:
        """
        Raises:
            StudyError: the record of nights is damaged.
        """
        self._folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._database() as database:
                database.execute(_SCHEMA)
                database.execute("PRAGMA quick_check").fetchall()
        except sqlite3.DatabaseError as error:
            words = shlex.join(["mv", str(folder.database), f"{folder.database}.damaged"])
            raise StudyError(
                f"{folder.database}: the record of nights cannot be opened ({error}). If it is damaged, "
                f"move it away ({words}): the nights' own records stay, and tonight may run once more"
            ) from None

    @contextmanager
    def claim(
        self, set_name: str, on: date, now: datetime, wait_seconds: float = 0
    ) -> Iterator[NightClaim]:
        """Hold the claim on one night until the block ends. Only `end` marks the night as finished.

        Args:
            set_name: name of the set.
            on: local date on which the night begins.
            now: current time, for the record.
            wait_seconds: seconds to wait for another process that runs the set.

        Raises:
            NightTaken: another process runs the set, or this night has already run.
        """
        # The lock is per set: nights of one set must not overlap, other sets may run.
        lock = FileLock(self._folder.lock(set_name), timeout=wait_seconds)
        try:
            lock.acquire()
        except Timeout:
            raise NightTaken(f"nightly {set_name}: another process is running it") from None
        try:
            claim = self._start(set_name, on, now)
            held = {"process": getpid(), "date": on.isoformat()}
            write_json(self._folder.holder(set_name), held)
            yield claim
        finally:
            # The holder file goes before the lock, or it could delete the next holder's.
            self._folder.holder(set_name).unlink(missing_ok=True)
            lock.release()

    def holder(self, set_name: str) -> LockHolder | None:
        """Return the process that runs a set. None if there is none, or its file is not written yet."""
        try:
            # A holder file may be left by a killed process, so the lock decides.
            with FileLock(self._folder.lock(set_name), timeout=0):
                return None
        # The process that holds the lock has named itself in its file.
        except Timeout:
            pass
        path = self._folder.holder(set_name)
        held = read_object(path, "the process that runs the set is unknown")
        try:
            process, on = int(held["process"]), date.fromisoformat(held["date"])
        except (KeyError, TypeError, ValueError, OverflowError):  # the last one of int(1e999)
            return None
        # numbers from 1 down mean init, and groups of processes
        return LockHolder(process, on) if 1 < process < 2**31 else None

    def end(self, claim: NightClaim, result: str, now: datetime) -> None:
        """Record that a night has finished, so that it never runs again."""
        with self._database() as database:
            database.execute(
                # A row with an end is never started again, whatever a scheduler does.
                "UPDATE nights SET ended_at = ?, result = ? WHERE set_name = ? AND local_date = ?",
                (_text(now), result, claim.set_name, claim.date.isoformat()),
            )

    def result(self, set_name: str, on: date) -> str | None:
        """Return a night's result, or None if the night has not finished."""
        with self._database() as database:
            row = database.execute(
                "SELECT result FROM nights WHERE set_name = ? AND local_date = ?",
                (set_name, on.isoformat()),
            ).fetchone()
        return None if row is None else row[0]

    def _start(self, set_name: str, on: date, now: datetime) -> NightClaim:
        key = (set_name, on.isoformat())
        with self._database() as database:
            row = database.execute(
                # One statement decides: a new row, one more start of an unfinished night, or no row.
                "INSERT INTO nights (set_name, local_date, starts, started_at) VALUES (?, ?, 1, ?) "
                "ON CONFLICT DO UPDATE SET starts = starts + 1 WHERE ended_at IS NULL "
                "RETURNING starts, started_at",
                (*key, _text(now)),
            ).fetchone()
        if row is None:
            raise NightTaken(f"nightly {set_name}: the night of {on} has been run already")
        return NightClaim(set_name, on, int(row[0]), datetime.fromisoformat(row[1]))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._folder.database, timeout=BUSY_SECONDS)
        # A connection's own `with` ends the transaction and leaves the file open.
        with closing(database), database:
            yield database


def _text(instant: datetime) -> str:
    # One time zone makes the texts comparable.
    return instant.astimezone(UTC).isoformat(timespec="seconds")
