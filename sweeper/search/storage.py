"""Optuna's RDBStorage with patience: a call waits for an unreachable database instead of failing.

Training continues during an outage. The workers' messages wait in their pipes.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial
from sqlalchemy.exc import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from sweeper.core.errors import StudyError
from sweeper.core.references import referenced_tree
from sweeper.search.ownership import (
    CONNECT_SECONDS,
    NullOwnership,
    StudyOwnership,
    database_file,
    make_ownership,
)

# for studies that share a file, each of whose commits locks it (Python waits 5 s by default)
SQLITE_TIMEOUT_S = 60
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
"""Seconds before the second try to reach a database, and the most between two. A judgement: a restart is
noticed soon, and a server that comes up is not flooded."""
SAY_SECONDS = 5.0
"""Seconds of one attempt to open a database after which a message says that it is waited for."""
STARTS = 10
"""Attempts to open an empty database while other processes create its tables."""
PATIENCE_S = 15 * 60.0
"""Seconds to wait for the database. A restart takes seconds, a fail-over minutes. After that a person
has to look.
"""

OUTAGES = (OperationalError, InterfaceError, PendingRollbackError)
"""SQLAlchemy errors that mean an outage.

PendingRollbackError follows when a connection breaks between two statements of one call. Every call
opens a new transaction, so a repeated call is safe.
"""

DAMAGED_FILE = (
    "malformed",
    "file is not a database",
    "database disk image",
    "unsupported file format",
)
"""Words of SQLite about a file that no wait mends."""
DAMAGES = (JSONDecodeError, UnicodeDecodeError, LookupError, OverflowError)
"""Errors of Optuna and SQLAlchemy about a stored value that is none. LookupError is one of a state's
name, and its kinds KeyError and IndexError are Optuna's answers about what does not exist."""
BUILD_DAMAGES = (ValueError, TypeError, LookupError, OverflowError, AttributeError, AssertionError)
"""Errors of Optuna about a stored trial whose domains or numbers are none."""

CACHED = (
    *("_create_new_trial", "_set_trial_param", "_get_best_trial_id", "_get_trials"),
    "get_trial_id_from_study_id_trial_number",
)
"""Methods that Optuna's cache in front of every RDBStorage calls instead of the public interface."""
CLAIMS = frozenset({"create_new_trial", "_create_new_trial", "set_trial_state_values"})
"""Calls that only the one driver of a study may make: asking and telling."""
TRIAL_READS = frozenset({"get_trial", "get_all_trials", "_get_trials"})
"""Calls that raise a ValueError or TypeError only for what is stored, such as a date that is none."""
ATTRIBUTES = frozenset({"set_study_user_attr", "set_trial_user_attr"})
"""Calls that store texts."""

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


def _never() -> float:
    return -math.inf


def _nothing() -> None:
    """Let a wait continue."""


@dataclass(frozen=True)
class OpeningWait:
    """The patience with a database that is away when a study opens it, and what ends the wait."""

    patience_s: float = 0.0
    seconds_over: Callable[[], float] = _never
    """Seconds since the end of the study's time, negative before."""
    check: Callable[[], object] = _nothing
    """Called before each attempt. An error of it ends the wait, as a signal does."""

    def is_worth(self, waited_s: float) -> bool:
        """Return True if the database is still waited for."""
        return waited_s < self.patience_s and self.seconds_over() < 0

    def words(self) -> str:
        """Return why the database is no longer waited for, or "" if it never was."""
        if self.patience_s == 0:
            return ""
        if self.seconds_over() >= 0:
            return ". The study's time is used up"
        return f". It has been away for {self.patience_s / 60:.0f} minutes"


class KeptJournal(sqlite3.Connection):
    """An SQLite connection whose rollback journal is overwritten, not deleted, at every commit.

    As durable as SQLite's default and several times faster, because a commit changes no directory.
    The write-ahead log was rejected: its index is shared memory, so other machines could not read a
    study on a network file system.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode = PERSIST").close()


# Optuna's own retries cover heartbeats only, which ask and tell do not use.
class PatientStorage(RDBStorage):
    """An RDBStorage whose public calls are repeated while the database cannot be reached.

    Raises, from its constructor and after PATIENCE_S from any call:
        StudyError: the database is unreachable, or cannot be opened as the kind its URL names.
    """

    def __init__(self, url: str, wait: OpeningWait | None = None) -> None:
        """Open a database, and wait for one that is away."""
        self.gave_up = False
        """True after one call's patience ran out: the final calls of the study then wait no more."""
        # a restart leaves dead connections behind
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            options["connect_args"] = {"timeout": SQLITE_TIMEOUT_S, "factory": KeptJournal}
        elif url.startswith("postgresql"):
            options["connect_args"] = {
                "options": "-c timezone=utc",
                "connect_timeout": CONNECT_SECONDS,
            }
        self._open(url, options, wait or OpeningWait())
        self._ownership: StudyOwnership = NullOwnership()

    def _open(self, url: str, options: dict[str, Any], wait: OpeningWait) -> None:
        """Call Optuna's constructor, again and again while the database is away."""
        tries, began = 0, time.monotonic()
        with _said_after(SAY_SECONDS, "waiting for the study's database to answer"):
            while True:
                wait.check()
                tries += 1
                try:
                    return super().__init__(url, engine_kwargs=options)
                except ImportError as error:
                    raise StudyError(
                        f"hydra.sweeper.storage needs a driver that is not installed ({error}). "
                        "Install it for postgresql+psycopg:// with pip install 'sweeper[postgres]'"
                    ) from None
                except (SQLAlchemyError, StorageInternalError) as error:
                    waits = _is_away(error) and wait.is_worth(time.monotonic() - began)
                    if not (waits or (tries < STARTS and _was_created_meanwhile(error))):
                        raise _unopened(url, error, wait) from None
                    if waits and tries == 1:
                        _LOG.warning("waiting for the study's database: %s", _reason(error))
                except (*DAMAGES, AssertionError, RuntimeError) as error:
                    # the last two are Optuna's own checks of the tables' version
                    raise damaged(url, error) from None
                time.sleep(FIRST_WAIT_S)

    @contextmanager
    def owned(self, study_name: str) -> Iterator[None]:
        """Hold the ownership of the study for the duration of the block.

        Raises:
            StudyLocked: another driver owns the study. Asking and telling raise it too, if another
                driver took over during an outage.
        """
        self._ownership = make_ownership(str(self.url), study_name)
        try:
            patient(self._ownership.hold)()
            yield
        finally:
            self._ownership.release()
            self._ownership = NullOwnership()

    def _build_frozen_trial_from_trial_model(self, trial: TrialModel) -> FrozenTrial:
        """Build a trial of its rows, whose errors cannot mean that the trial does not exist."""
        try:
            # SQLite keeps a text in a column of numbers
            operator.index(trial.number)
            return super()._build_frozen_trial_from_trial_model(trial)
        except BUILD_DAMAGES as error:
            raise damaged(str(self.url), error) from None

    def hold(self) -> None:
        """Verify that no other driver has taken over."""
        self._ownership.hold()


def patient(
    call: Callable[..., Result],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[..., Result]:
    """Return a call that is repeated with growing pauses while the database is unreachable.

    If the first try was stored although it failed, the repeated call finds the trial finished,
    which counts as success.
    """

    @functools.wraps(call)
    def repeated(*arguments: Any, **options: Any) -> Result:
        storage = arguments[0] if arguments and isinstance(arguments[0], PatientStorage) else None
        began, wait_s, tries = clock(), FIRST_WAIT_S, 0
        while True:
            tries += 1
            try:
                return call(*arguments, **options)
            except UpdateFinishedTrialError:
                # A first call that finds the trial finished is a real mistake, a repeated one was
                # stored.
                if tries == 1 or call.__name__ != "set_trial_state_values":
                    raise
                return True  # type: ignore[return-value]  # what set_trial_state_values answers
            except (StorageInternalError, *OUTAGES) as error:
                if not _is_away(error):
                    raise
                gave_up = storage is not None and storage.gave_up
                if gave_up or clock() - began > PATIENCE_S:
                    if storage is not None:
                        storage.gave_up = True
                    raise StudyError(
                        f"the study's database has been away for {PATIENCE_S / 60:.0f} minutes "
                        f"({_reason(error)}). Everything recorded so far is kept. Restore the "
                        "database and run the same command again"
                    ) from None
                if tries == 1:
                    _LOG.warning("waiting for the study's database: %s", _reason(error))
            sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    return repeated


def _sound(call: Callable[..., Result]) -> Callable[..., Result]:
    """Return a call that names a damaged or deleted database, for which no wait is of use."""

    @functools.wraps(call)
    def read(storage: PatientStorage, *arguments: Any, **options: Any) -> Result:
        try:
            return call(storage, *arguments, **options)
        except DAMAGES as error:
            if isinstance(error, KeyError | IndexError):
                raise
            raise damaged(str(storage.url), error) from None
        except (ValueError, TypeError) as error:
            if call.__name__ not in TRIAL_READS:
                raise
            raise damaged(str(storage.url), error) from None
        except (StorageInternalError, DatabaseError) as error:
            if _is_damaged(error) or _is_gone(str(storage.url), error):
                raise damaged(str(storage.url), error) from None
            raise

    return read


def _claiming(call: Callable[..., Result]) -> Callable[..., Result]:
    @functools.wraps(call)
    def claimed(storage: PatientStorage, *arguments: Any, **options: Any) -> Result:
        # in every repetition: a restart of the server frees the
        # lock, and another driver may take it
        storage.hold()
        return call(storage, *arguments, **options)

    return claimed


def _with_references(call: Callable[..., Result]) -> Callable[..., Result]:
    """Return a call that stores an attribute, with references for what came from the environment."""

    @functools.wraps(call)
    def stored(storage: PatientStorage, identity: int, key: str, value: Any) -> Result:
        return call(storage, identity, key, referenced_tree(value))

    return stored


for _name in (*sorted(BaseStorage.__abstractmethods__), *CACHED):
    _call = getattr(RDBStorage, _name)
    # A loop instead of thirty methods: a method that Optuna adds to the interface is covered too.
    _call = _claiming(_call) if _name in CLAIMS else _call
    _call = _with_references(_call) if _name in ATTRIBUTES else _call
    setattr(PatientStorage, _name, patient(_sound(_call)))


def _is_damaged(error: Exception) -> bool:
    """Return True if a database file is none, or holds pages that are none."""
    return any(words in str(_cause(error)) for words in DAMAGED_FILE)


@contextmanager
def _said_after(seconds: float, text: str) -> Iterator[None]:
    """Log a warning if the block takes longer: one attempt at a silent server takes CONNECT_SECONDS."""
    timer = threading.Timer(seconds, _LOG.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unopened(url: str, error: Exception, wait: OpeningWait) -> StudyError:
    if _is_damaged(error):
        return damaged(url, error)
    ended = wait.words() if _is_away(error) else ""
    return StudyError(f"hydra.sweeper.storage cannot be opened: {_reason(error)}{ended}")


def _is_gone(url: str, error: Exception) -> bool:
    """Return True if a database is a file that was deleted or emptied."""
    path = database_file(url)
    return path is not None and (not path.exists() or "no such table" in str(_cause(error)))


def damaged(url: str, error: Exception) -> StudyError:
    """Return what is wrong with a database that no wait mends, and what to do."""
    path = database_file(url)
    reason = f"{type(error).__name__}: {_reason(error)}"
    if path is None:
        return StudyError(f"the study's database holds what Optuna does not read ({reason})")
    if not path.exists():
        return StudyError(
            f"{path}: the study's database is gone ({reason}). Put it back, or run the same command "
            "again to begin anew: the trials' folders are then set aside, and the answer stays until a "
            "new one replaces it"
        )
    words = shlex.join(["mv", str(path), f"{path}.damaged"])
    return StudyError(
        f"{path}: the study's database is damaged ({reason}). Put a copy of it back, or move it away "
        f"({words}) and run the same command again: the trials' folders are then set aside, and the "
        "answer stays until a new one replaces it"
    )


def _is_away(error: Exception) -> bool:
    """Return True if the database is unreachable or temporarily refuses (locked, disk full)."""
    return isinstance(_cause(error), OUTAGES)


def _was_created_meanwhile(error: Exception) -> bool:
    """Return True if another study created the tables between Optuna's look and its creation."""
    return isinstance(_cause(error), IntegrityError) or "already exists" in str(_cause(error))


def _cause(error: Exception) -> BaseException | None:
    """Return SQLAlchemy's error, which Optuna sometimes wraps."""
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _reason(error: Exception) -> str:
    """Return the first line of the database driver's message. SQLAlchemy keeps passwords out of it."""
    cause = _cause(error)
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
