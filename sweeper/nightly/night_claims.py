"""Who runs a night: one row per set and local date, and a lock that dies with its process.

The row is the memory (this night was run, and how it ended), the lock is the present (somebody is
running it). A scheduler may fire twice, late, or after a crash: the first to hold the lock of a night
that has not ended runs it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from json import JSONDecodeError
from os import getpid

from filelock import FileLock, Timeout

from sweeper.core.errors import SweeperError
from sweeper.core.paths import NightsFolder, read_json, write_json

BUSY_SECONDS = 60.0

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
    """Another process runs this set, or this night is over."""


@dataclass(frozen=True)
class NightClaim:
    """The right to run one night, for as long as the block that got it lasts."""

    set_name: str
    date: date
    starts: int
    """1, or more after a crash: the night goes on where it was."""
    began: datetime
    """When the first of its starts was: the night's time is counted from there."""


@dataclass(frozen=True)
class LockHolder:
    """The process that runs a set at this moment."""

    process: int
    date: date


class NightLog:
    """The nights of all sets under one folder."""

    def __init__(self, folder: NightsFolder) -> None:
        self._folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        with self._database() as database:
            database.execute(_SCHEMA)

    @contextmanager
    def claim(
        self, set_name: str, on: date, now: datetime, wait_seconds: float = 0
    ) -> Iterator[NightClaim]:
        """Hold one night, until the block ends; whether the night is over, `end` says.

        Args:
            set_name: whose night.
            on: the local date it begins on.
            now: for the record.
            wait_seconds: how long a process that runs the set is waited for.

        Raises:
            NightTaken: the set is running at this moment, or this night has ended before.
        """
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
            self._folder.holder(set_name).unlink(missing_ok=True)
            lock.release()

    def holder(self, set_name: str) -> LockHolder | None:
        """Who runs a set, while somebody does; None in the moment before it is known."""
        try:
            with FileLock(self._folder.lock(set_name), timeout=0):
                return None
        except Timeout:
            pass
        try:
            held = read_json(self._folder.holder(set_name))
        except (FileNotFoundError, JSONDecodeError):
            return None
        return LockHolder(int(held["process"]), date.fromisoformat(held["date"]))

    def end(self, claim: NightClaim, result: str, now: datetime) -> None:
        """Record that a night is over, so that it never runs again."""
        with self._database() as database:
            database.execute(
                "UPDATE nights SET ended_at = ?, result = ? WHERE set_name = ? AND local_date = ?",
                (_text(now), result, claim.set_name, claim.date.isoformat()),
            )

    def result(self, set_name: str, on: date) -> str | None:
        """How a night ended; None if it did not run, or not to its end."""
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
        with closing(database), database:
            yield database


def _text(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="seconds")
