"""Optuna's RDBStorage, patient: a call waits for a database that is away, instead of ending the study.

Training goes on meanwhile; what the workers report waits in their pipes. Knows nothing of studies.
"""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from sweeper.core.errors import StudyError
from sweeper.search.ownership import NullOwnership, StudyOwnership, make_ownership

SQLITE_TIMEOUT_S = 60
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
STARTS = 10
"""How often an empty database is opened while others make its tables."""
PATIENCE_S = 15 * 60.0
"""A restart takes seconds, a fail-over minutes; after that a person has to look."""

OUTAGES = (OperationalError, InterfaceError, PendingRollbackError)
"""The last where a connection breaks between two statements of a call: the second's complaint that the
transaction has to be rolled back. The next call has a new one."""

CACHED = (
    *("_create_new_trial", "_set_trial_param", "_get_best_trial_id", "_get_trials"),
    "get_trial_id_from_study_id_trial_number",
)
"""What Optuna's cache, which it puts before every RDBStorage, calls instead of the interface."""
CLAIMS = frozenset({"create_new_trial", "_create_new_trial", "set_trial_state_values"})
"""Calls that only the one driver of a study may make: asking and telling."""

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


class KeptJournal(sqlite3.Connection):
    """A connection whose rollback journal is overwritten, not deleted, at every commit.

    As durable as SQLite's default, and several times faster: a commit changes no directory. Not the
    write-ahead log: its index is shared memory, so a study on a network file system could be read on
    the driver's machine only.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode = PERSIST").close()


class PatientStorage(RDBStorage):
    """RDBStorage whose public calls are repeated while the database cannot be reached.

    Raises, from its constructor and after PATIENCE_S from any call:
        StudyError: the database is away, or cannot be opened as what the URL says.
    """

    def __init__(self, url: str) -> None:
        self.gave_up = False
        """Whether a call's patience ended: a study that ends for it has no more for its last words."""
        # a restart leaves dead connections behind
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            options["connect_args"] = {"timeout": SQLITE_TIMEOUT_S, "factory": KeptJournal}
        elif url.startswith("postgresql"):
            options["connect_args"] = {"options": "-c timezone=utc"}
        for tries_left in reversed(range(STARTS)):
            try:
                super().__init__(url, engine_kwargs=options)
                break
            except ImportError as error:
                raise StudyError(
                    f"hydra.sweeper.storage needs a driver that is not installed ({error}); "
                    "for postgresql+psycopg:// add it with pip install 'sweeper[postgres]'"
                ) from None
            except (SQLAlchemyError, StorageInternalError) as error:
                if not (tries_left and _was_created_meanwhile(error)):
                    raise StudyError(
                        f"hydra.sweeper.storage cannot be opened: {_reason(error)}"
                    ) from None
            time.sleep(FIRST_WAIT_S)
        self._ownership: StudyOwnership = NullOwnership()

    @contextmanager
    def owned(self, study_name: str) -> Iterator[None]:
        """Be the only one who asks and tells trials of a study.

        Raises:
            StudyLocked: another driver is; from asking and telling, if it took over in an outage.
        """
        self._ownership = make_ownership(str(self.url), study_name)
        try:
            patient(self._ownership.hold)()
            yield
        finally:
            self._ownership.release()
            self._ownership = NullOwnership()

    def hold(self) -> None:
        """Make sure that no other driver has taken over."""
        self._ownership.hold()


def patient(
    call: Callable[..., Result],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[..., Result]:
    """A call that is repeated, with longer and longer waits, while the database is away.

    A repeated call whose first try was stored after all finds the trial finished: then it is done.
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
                        f"({_reason(error)}); nothing told so far is lost: bring it back and run "
                        "the same command again"
                    ) from None
                if tries == 1:
                    _LOG.warning("waiting for the study's database: %s", _reason(error))
            sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    return repeated


def _claiming(call: Callable[..., Result]) -> Callable[..., Result]:
    @functools.wraps(call)
    def claimed(storage: PatientStorage, *arguments: Any, **options: Any) -> Result:
        storage.hold()
        return call(storage, *arguments, **options)

    return claimed


for _name in (*sorted(BaseStorage.__abstractmethods__), *CACHED):
    _call = getattr(RDBStorage, _name)
    setattr(PatientStorage, _name, patient(_claiming(_call) if _name in CLAIMS else _call))


def _is_away(error: Exception) -> bool:
    """Whether the database could not be reached, or refused for the moment (locked, disk full)."""
    return isinstance(_cause(error), OUTAGES)


def _was_created_meanwhile(error: Exception) -> bool:
    """Whether another study was faster to make the tables: Optuna looks for them, then makes them."""
    return isinstance(_cause(error), IntegrityError) or "already exists" in str(_cause(error))


def _cause(error: Exception) -> BaseException | None:
    """SQLAlchemy's error; Optuna wraps some."""
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _reason(error: Exception) -> str:
    """The driver's first line; SQLAlchemy keeps passwords out of it."""
    cause = _cause(error)
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
