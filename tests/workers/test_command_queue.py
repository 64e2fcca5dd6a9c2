"""A worker's orders: work waits its turn, stops take effect at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from sweeper.core.value import FrozenValue
from sweeper.workers.protocol import CloseCommand, StopCommand, SubmitCommand, WorkerCommand
from sweeper.workers.worker import CommandQueue
from tests.conftest import make_settings


class Line:
    """A channel on which everything was said already."""

    def __init__(self, *commands: WorkerCommand) -> None:
        self._commands: Iterator[WorkerCommand] = iter(commands)
        self._never = threading.Event()

    def send(self, message: FrozenValue) -> None:
        """See Channel."""

    def receive(self) -> WorkerCommand:
        """See Channel."""
        for command in self._commands:
            return command
        self._never.wait()
        raise AssertionError


def _submit(trial: str) -> SubmitCommand:
    settings = make_settings().trial
    return SubmitCommand(job=trial, attempt=1, folder=Path(), settings=settings, provenance={})


def test_a_stop_does_not_reach_the_next_attempt_of_its_trial() -> None:
    """Paused just before its end and handed out again, a trial is not stopped by the old order."""
    stopped = [StopCommand(job=trial, cause="cancelled") for trial in ("lora/0000", "lora/0001")]
    orders = CommandQueue.listen(Line(*stopped, _submit("lora/0000"), CloseCommand()))
    assert isinstance(orders.work.get(timeout=10), SubmitCommand)
    assert isinstance(orders.work.get(timeout=10), CloseCommand)
    assert orders.stops == {"lora/0001": "cancelled"}
