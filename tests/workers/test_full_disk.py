"""A worker whose disk is full: it waits and says so, and the trial continues by itself."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import StudyError
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import ArmBaseline, HeldOutKind, HeldOutLosses, Outcome
from sweeper.core.paths import TrialFolder
from sweeper.core.value import FrozenValue
from sweeper.training.observer import TrialObserver
from sweeper.workers import worker
from sweeper.workers.protocol import CloseCommand, EndedEvent, SubmitCommand, WaitingEvent
from sweeper.workers.worker import CommandQueue, serve
from tests.conftest import make_settings


@dataclass
class FullDisk:
    """A runner that finds no space so many times."""

    times: int
    worn_out: bool = False

    def probe(self, settings: TrialSettings) -> ArmBaseline:
        raise NotImplementedError

    def test(
        self,
        settings: TrialSettings,
        folder: TrialFolder | None,
        kinds: Sequence[HeldOutKind],
        expected: InputDigests | None,
    ) -> HeldOutLosses:
        raise NotImplementedError

    def judge_baseline(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        model: Path,
        expected: InputDigests | None,
    ) -> Outcome:
        raise NotImplementedError

    def run(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        provenance: dict[str, Any],
        observer: TrialObserver,
        expected: InputDigests | None,
    ) -> Outcome:
        if self.times:
            self.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return Outcome(cause="finished")


@dataclass
class Sent:
    """A channel that keeps what was sent."""

    events: list[FrozenValue] = field(default_factory=list)

    def send(self, message: FrozenValue) -> None:
        self.events.append(message)

    def receive(self) -> Any:
        raise StudyError("nothing is received here")


def _serve(
    runner: FullDisk, tmp_path: Path, stop: bool = False, trials: int = 1
) -> list[FrozenValue]:
    orders, channel = CommandQueue(), Sent()
    submit = SubmitCommand(
        job="lora/0000",
        attempt=1,
        folder=tmp_path,
        settings=make_settings().trial,
        provenance={},
    )
    for _ in range(trials):
        orders.work.put(submit)
    orders.work.put(CloseCommand())
    if stop:
        orders.stops["lora/0000"] = "cancelled"
    serve(channel, orders, runner, 0)
    return [event for event in channel.events if isinstance(event, WaitingEvent | EndedEvent)]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FULL_DISK_WAIT_S", 0.001)


def test_the_trial_continues_when_there_is_space(tmp_path: Path) -> None:
    """Three times none: said once, with the folder; then the trial ends as it would have."""
    waiting, ended = _serve(FullDisk(3), tmp_path)
    assert isinstance(waiting, WaitingEvent)
    assert str(tmp_path) in waiting.message
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "finished"


def test_a_stop_ends_the_waiting(tmp_path: Path) -> None:
    """Ctrl-C while the disk is full: the trial is cancelled, to be continued."""
    _, ended = _serve(FullDisk(10**6), tmp_path, stop=True)
    assert isinstance(ended, EndedEvent)
    assert ended.outcome.cause == "cancelled"


def test_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stays full is an error in one line, and names the folder."""
    monkeypatch.setattr(worker, "FULL_DISK_PATIENCE_S", 0.005)
    _, ended = _serve(FullDisk(10**6), tmp_path)
    assert isinstance(ended, EndedEvent)
    assert (ended.outcome.cause, "stays full" in str(ended.outcome.message)) == ("error", True)


def test_patience_is_for_the_disk_and_not_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is over the next trial is an error at once, so that a night ends before the morning."""
    monkeypatch.setattr(worker, "FULL_DISK_PATIENCE_S", 0.005)
    disk = FullDisk(10**6)
    events = _serve(disk, tmp_path, trials=3)
    assert [event.outcome.cause for event in events if isinstance(event, EndedEvent)] == [
        "error"
    ] * 3
    assert 10**6 - disk.times == 6 + 1 + 1 + 1, "six waits for the first, none for the others"


def test_a_worn_out_worker_ends_after_its_trial(tmp_path: Path) -> None:
    """Memory that only the end of the process frees: the second trial is its successor's."""
    assert len(_serve(FullDisk(0), tmp_path, trials=2)) == 2
    assert len(_serve(FullDisk(0, worn_out=True), tmp_path, trials=2)) == 1
