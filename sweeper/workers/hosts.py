"""What engines with several workers share: who was handed what, and who failed to start."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from sweeper.errors import WorkerError
from sweeper.outcome import StopCause, Value
from sweeper.workers.protocol import (
    AnyEvent,
    Check,
    Ended,
    Probe,
    Slots,
    Stop,
    Submit,
    Test,
    Tested,
)

MAX_FAILED_STARTS = 3


class Host(Protocol):
    """The driver's view of one worker."""

    started: bool
    current: Submit | Test | None

    def send(self, message: Value) -> None:
        """Send a command; a worker that just died is noticed by `next_event`."""


H = TypeVar("H", bound=Host)


class HostedEngine(Generic[H]):
    """An engine's orders, each for the host of a worker."""

    def __init__(self) -> None:
        self._hosts: dict[int, H] = {}
        self._failed_starts = 0

    def probe(self, worker: int, probe: Probe | Check) -> None:
        """See Engine."""
        self._hosts[worker].send(probe)

    def submit(self, worker: int, submit: Submit) -> None:
        """See Engine."""
        self._hosts[worker].current = submit
        self._hosts[worker].send(submit)

    def test(self, worker: int, test: Test) -> None:
        """See Engine."""
        self._hosts[worker].current = test
        self._hosts[worker].send(test)

    def stop(self, trial: str, cause: StopCause) -> None:
        """See Engine."""
        for host in self._hosts.values():
            if host.current is not None and host.current.trial == trial:
                host.send(Stop(trial=trial, cause=cause))

    def _heard(self, host: H, event: AnyEvent) -> None:
        """Take note of what an event says about its host."""
        if isinstance(event, Slots):
            host.started = True
            self._failed_starts = 0
        elif isinstance(event, Ended | Tested):
            host.current = None

    def _died(self, worker: int, host: H, words: str) -> None:
        """Take note of a death.

        Raises:
            WorkerError: workers die one after the other before they can do anything.
        """
        if not host.started:
            self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(f"worker {worker} dies before it can start:\n{words}")
