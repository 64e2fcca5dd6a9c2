"""A worker's orders: work waits its turn, stops take effect at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from sweeper.outcome import Value
from sweeper.workers.protocol import AnyCommand, Close, Stop, Submit
from sweeper.workers.worker import Orders
from tests.conftest import make_settings


class Line:
    """A channel on which everything was said already."""

    def __init__(self, *commands: AnyCommand) -> None:
        self._commands: Iterator[AnyCommand] = iter(commands)
        self._never = threading.Event()

    def send(self, message: Value) -> None:
        """See Channel."""

    def receive(self) -> AnyCommand:
        """See Channel."""
        for command in self._commands:
            return command
        self._never.wait()
        raise AssertionError


def _submit(trial: str) -> Submit:
    settings = make_settings().trial
    return Submit(trial=trial, attempt=1, folder=Path(), settings=settings, provenance={})


def test_a_stop_does_not_reach_the_next_attempt_of_its_trial() -> None:
    """Paused just before its end and handed out again, a trial is not stopped by the old order."""
    stopped = [Stop(trial=trial, cause="cancelled") for trial in ("lora/0000", "lora/0001")]
    orders = Orders.listen(Line(*stopped, _submit("lora/0000"), Close()))
    assert isinstance(orders.work.get(timeout=10), Submit)
    assert isinstance(orders.work.get(timeout=10), Close)
    assert orders.stops == {"lora/0001": "cancelled"}
