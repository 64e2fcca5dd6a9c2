"""A database that goes away and comes back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, _CachedStorage
from sqlalchemy.exc import OperationalError, PendingRollbackError

from sweeper.core.errors import StudyError
from sweeper.search.storage import PATIENCE_S, PatientStorage, patient
from sweeper.search.study import share_cache


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def _away(wrapped: bool) -> Exception:
    error = OperationalError("select 1", {}, Exception("connection refused"))
    if not wrapped:
        return error
    outer = StorageInternalError("commit")
    outer.__cause__ = error
    return outer


def _call(clock: Clock, *answers: Any, name: str = "get_trial") -> Callable[[], Any]:
    script = list(answers)

    def call() -> Any:
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    call.__name__ = name
    return patient(call, clock, clock.sleep)


def test_a_connection_that_breaks_within_a_call_is_an_outage() -> None:
    """SQLAlchemy then wants the transaction rolled back; the next call has one of its own."""
    broken = StorageInternalError("commit")
    broken.__cause__ = PendingRollbackError(
        "Can't reconnect until invalid transaction is rolled back"
    )
    assert _call(Clock(), broken, "answer")() == "answer"


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_call_waits_until_the_database_is_back(wrapped: bool) -> None:
    """Three failures, then the answer; the waits grow."""
    clock = Clock()
    assert _call(clock, *[_away(wrapped)] * 3, "answer")() == "answer"
    assert clock.now == 0.5 + 1 + 2


def test_patience_ends_with_a_message_that_says_what_to_do() -> None:
    """A quarter of an hour, then StudyError; no password and no stack trace in it."""
    clock = Clock()
    with pytest.raises(StudyError, match="run the same command again"):
        _call(clock, _away(True))()
    assert PATIENCE_S < clock.now < PATIENCE_S + 20


def test_other_errors_are_not_waited_for() -> None:
    """A mistake in the call itself comes out at once."""
    clock = Clock()
    with pytest.raises(KeyError):
        _call(clock, KeyError("no such trial"))()
    assert clock.now == 0


def test_a_state_that_was_stored_before_the_connection_broke_counts_as_stored() -> None:
    """The answer got lost, not the commit; without a break the same error is an error."""
    clock = Clock()
    finished = UpdateFinishedTrialError("already finished")
    assert _call(clock, _away(True), finished, name="set_trial_state_values")() is True
    with pytest.raises(UpdateFinishedTrialError):
        _call(clock, finished, name="set_trial_state_values")()


def test_a_storage_that_gave_up_does_not_wait_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study ends then; each of its last calls would wait a quarter of an hour more."""
    storage = PatientStorage(f"sqlite:///{tmp_path / 'study.db'}")
    clock = Clock()
    tries: list[float] = []

    def away(storage: PatientStorage) -> None:
        tries.append(clock())
        raise _away(wrapped=True)

    call = patient(away, clock, clock.sleep)
    for _ in range(2):
        with pytest.raises(StudyError, match="has been away for 15 minutes"):
            call(storage)
    assert tries[-1] == tries[-2], "the second call was tried once"


def test_every_call_of_optunas_storage_is_patient(tmp_path: Path) -> None:
    """No method of the interface is left out, nor any that Optuna's cache calls; a study works on it."""
    storage = PatientStorage(f"sqlite:///{tmp_path / 'study.db'}")
    cached = set(re.findall(r"_backend\.(\w+)\(", inspect.getsource(_CachedStorage)))
    heartbeats = {name for name in cached if "heartbeat" in name or "stale" in name}
    for name in BaseStorage.__abstractmethods__ | (cached - heartbeats):
        assert hasattr(getattr(PatientStorage, name), "__wrapped__"), name
    study = optuna.create_study(storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert len(study.trials) == 3


def test_sqlite_keeps_its_journal_and_syncs_every_commit(tmp_path: Path) -> None:
    """Fast commits that a power cut does not undo, on every connection."""
    storage = PatientStorage(f"sqlite:///{tmp_path / 'study.db'}")
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "persist"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "FULL"


def test_studies_on_one_cache_read_a_finished_trial_once(tmp_path: Path) -> None:
    """What the driver has read is not read again for the results, and what is new is seen by both."""
    storage = share_cache(PatientStorage(f"sqlite:///{tmp_path / 'study.db'}"))
    study = optuna.create_study(study_name="s", storage=storage)
    study.tell(study.ask(), 1.0)
    (read,) = study.get_trials(deepcopy=False)
    again = optuna.load_study(study_name="s", storage=storage)
    assert again.get_trials(deepcopy=False)[0] is read
    study.tell(study.ask(), 2.0)
    assert [trial.value for trial in again.get_trials(deepcopy=False)] == [1.0, 2.0]


def test_an_empty_database_is_opened_by_many_at_once(tmp_path: Path) -> None:
    """Optuna looks for its tables and then makes them; who was slower opens what the others made."""
    together = Barrier(8)

    def start(url: str) -> list[Any]:
        together.wait()
        return PatientStorage(url).get_all_studies()

    with ThreadPoolExecutor(8) as pool:
        for number in range(3):
            url = f"sqlite:///{tmp_path / f'{number}.db'}"
            assert list(pool.map(start, [url] * 8)) == [[]] * 8


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+psycopg://me:geheim@127.0.0.1:9/optuna", "cannot be opened|needs a driver"),
        ("mysql+nodriver://me:geheim@127.0.0.1/optuna", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_an_error_without_its_password(
    url: str, words: str
) -> None:
    """One line for the user."""
    with pytest.raises(StudyError, match=words) as caught:
        PatientStorage(url)
    assert "geheim" not in str(caught.value)
