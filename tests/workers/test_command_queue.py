"""A worker's orders: work waits its turn, stops take effect at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeper.core.outcome import StopCause
from sweeper.core.value import FrozenValue
from sweeper.workers.protocol import (
    CloseCommand,
    ProceedCommand,
    StopCommand,
    SubmitCommand,
    WorkerCommand,
)
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


@pytest.mark.parametrize(
    ("decision", "cause"),
    [
        (ProceedCommand(job="lora/0000", step=5), "cancelled"),
        (StopCommand(job="lora/0000", cause="pruned"), "pruned"),
    ],
)
def test_a_trial_that_is_paused_at_a_look_learns_what_the_look_decided(
    decision: WorkerCommand, cause: StopCause
) -> None:
    """The order to stop comes first and does not end the wait; a hopeless trial ends as pruned."""
    orders = CommandQueue()
    orders._take(StopCommand(job="lora/0000", cause="cancelled"))
    trial = threading.Thread(target=orders.wait_for_answer, args=("lora/0000", 5), daemon=True)
    trial.start()
    trial.join(0.05)
    assert trial.is_alive()
    orders._take(decision)
    trial.join(10)
    assert not trial.is_alive()
    assert orders.stops["lora/0000"] == cause
