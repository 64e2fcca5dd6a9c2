"""Locks that keep a study to one driver, also across folders and machines that share a database.

The lock in the study's folder (sweeper.commands.run_study) separates drivers of one folder. The
locks here belong to the storage: an advisory lock in PostgreSQL, a lock file next to an SQLite
file. Without them, two drivers on one database would reattach each other's running trials.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from sweeper.core.errors import StudyLocked

KEEPALIVE = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}
"""TCP settings with which the server notices a dead driver within a minute and frees its lock."""
CONNECT_SECONDS = 30
"""Time limit of one connection to PostgreSQL. A frozen server accepts it and never answers."""


def database_url(path: Path) -> str:
    """Return the URL of an SQLite file. A path may hold ? and %, which mean more in a URL."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def database_file(url: str) -> Path | None:
    """Return the file of a database, or None if the database is no file."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


class StudyOwnership(Protocol):
    """The right to write a study."""

    def hold(self) -> None:
        """Take or keep the lock. Called before every operation that only one driver may perform.

        Raises:
            StudyLocked: another driver holds the lock.
            OperationalError: the database cannot be reached.
        """

    def release(self) -> None:
        """Release the lock, if it is held."""


def make_ownership(url: str, study_name: str) -> StudyOwnership:
    """Return the lock that fits a storage's URL, or a NullOwnership for other databases."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return AdvisoryLock(url, study_name)
    if (path := database_file(url)) is not None:
        return LockFile(str(path), study_name)
    return NullOwnership()


class NullOwnership:
    """No lock, for storages that cannot be locked."""

    def hold(self) -> None:
        """See StudyOwnership."""

    def release(self) -> None:
        """See StudyOwnership."""


class LockFile:
    """A lock file next to an SQLite file, which only processes of one machine can share."""

    def __init__(self, database: str, study_name: str) -> None:
        self._study_name = study_name
        # Not the database file itself, whose locks belong to SQLite.
        self._lock = FileLock(f"{database}.{study_name}.lock", timeout=0)

    def hold(self) -> None:
        """See StudyOwnership."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise _taken(self._study_name, "a process of this machine") from None

    def release(self) -> None:
        """See StudyOwnership."""
        self._lock.release()


class AdvisoryLock:
    """A session-level advisory lock of PostgreSQL on a connection of its own.

    The server frees the lock when the driver's connection ends, also after a restart or a network
    failure. `hold` then takes the lock again, or reports that another driver was faster.
    """

    def __init__(self, url: str, study_name: str) -> None:
        self._study_name = study_name
        digest = hashlib.sha256(f"sweeper study {study_name}".encode()).digest()
        # Advisory locks are named by a signed 64-bit integer.
        self._key = int.from_bytes(digest[:8], signed=True)
        settings = " ".join(f"-c {name}={value}" for name, value in KEEPALIVE.items())
        # PostgreSQL cuts application names at 63 bytes.
        name = f"sweeper {socket.gethostname()} process {os.getpid()}"
        options = {
            "options": settings,
            "application_name": name[:63],
            "connect_timeout": CONNECT_SECONDS,
        }
        # a pool would keep the connection open after its close, and with it the lock
        self._engine = create_engine(url, poolclass=NullPool, connect_args=options)
        self._connection: Connection | None = None

    def hold(self) -> None:
        """See StudyOwnership."""
        if self._connection is not None and self._alive(self._connection):
            return
        self.release()
        # Without AUTOCOMMIT the connection would sit in an open transaction for the whole study.
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        taken = text("select pg_try_advisory_lock(:key)")
        if not connection.execute(taken, {"key": self._key}).scalar_one():
            holder = self._holder(connection)
            connection.close()
            raise _taken(self._study_name, holder)
        self._connection = connection

    def release(self) -> None:
        """See StudyOwnership."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _alive(self, connection: Connection) -> bool:
        try:
            connection.execute(text("select 1"))
        except OperationalError:
            return False
        return True

    def _holder(self, connection: Connection) -> str:
        """Return the application name of the lock's holder, which names its process and host."""
        query = text(
            "select application_name from pg_locks join pg_stat_activity using (pid) "
            # PostgreSQL shows a 64-bit key in two halves, with objsubid 1
            "where locktype = 'advisory' and granted and objsubid = 1 "
            "and (classid::bigint << 32 | objid::bigint) = :key"
        )
        return str(connection.execute(query, {"key": self._key}).scalar() or "unknown")


def _taken(study_name: str, holder: str) -> StudyLocked:
    return StudyLocked(
        f"study {study_name!r} of this database is already run by another driver ({holder}). Wait "
        "for it, or start another study with hydra.sweeper.study_name=NAME"
    )
