"""A database that goes away and comes back."""

from __future__ import annotations

import inspect
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from sqlalchemy.exc import OperationalError, PendingRollbackError

from sweeper.core.errors import StudyError
from sweeper.core.signals import StopRequested, StopSignal
from sweeper.search import storage as storage_module
from sweeper.search.storage import PATIENCE_S, OpeningWait, PatientStorage, patient
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


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A database that refuses connections until three minutes have passed by the clock."""
    clock = Clock()
    opened = RDBStorage.__init__

    def refused(storage: RDBStorage, *words: Any, **more: Any) -> None:
        if clock() < 180:
            raise _away(wrapped=False)
        opened(storage, *words, **more)

    monkeypatch.setattr(RDBStorage, "__init__", refused)
    monkeypatch.setattr("sweeper.search.storage.time.monotonic", clock)
    monkeypatch.setattr("sweeper.search.storage.time.sleep", clock.sleep)
    return clock


def test_a_start_waits_for_a_database_that_is_away(
    away: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first refusal is said at once and once, and the study is opened when the database is back."""
    storage = PatientStorage(f"sqlite:///{tmp_path / 'study.db'}", OpeningWait(PATIENCE_S))
    assert away.now == 180
    assert storage.get_all_studies() == []
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for the study's database: (builtins.Exception) connection refused"
    ]


@pytest.mark.parametrize(
    ("patience_s", "ends_at", "now", "words"),
    [
        (0.0, 1e9, 0, "refused$"),
        (120.0, 1e9, 120, "It has been away for 2 minutes"),
        (PATIENCE_S, 20.0, 20, "The study's time is used up"),
        (PATIENCE_S, 0.0, 0, "The study's time is used up"),
    ],
)
def test_a_start_waits_no_longer_than_its_patience_and_the_studys_time(
    away: Clock, patience_s: float, ends_at: float, now: float, words: str
) -> None:
    """A first start ends at once, others with the reason why they no longer wait."""
    wait = OpeningWait(patience_s, lambda: away() - ends_at)
    with pytest.raises(StudyError, match=f"cannot be opened: .*{words}"):
        PatientStorage("sqlite:///study.db", wait)
    assert away.now == now


def test_a_stop_ends_the_wait_of_a_start(away: Clock) -> None:
    """One Ctrl-C, as anywhere else."""
    stop = StopSignal()

    def pressed() -> None:
        if away() > 10:
            stop.request()
        stop.check()

    with pytest.raises(StopRequested):
        PatientStorage("sqlite:///study.db", OpeningWait(PATIENCE_S, check=pressed))
    assert away.now < 15


@pytest.mark.slow
def test_a_server_that_accepts_and_says_nothing_is_waited_for_with_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said before the first attempt has failed."""
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is optional")
    monkeypatch.setattr(storage_module, "SAY_SECONDS", 0.2)
    monkeypatch.setattr(storage_module, "CONNECT_SECONDS", 2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"postgresql+psycopg://me@127.0.0.1:{server.getsockname()[1]}/optuna"
        began = time.monotonic()
        with pytest.raises(StudyError, match="cannot be opened"):
            PatientStorage(url)
    assert time.monotonic() - began < 20
    assert "waiting for the study's database to answer" in caplog.text
