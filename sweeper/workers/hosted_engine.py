"""What engines with several workers share: who was handed what, and who failed to start."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from sweeper.core.errors import WorkerError
from sweeper.core.outcome import StopCause
from sweeper.core.value import FrozenValue
from sweeper.workers.protocol import (
    CheckCommand,
    EndedEvent,
    JudgeCommand,
    JudgedEvent,
    ProbeCommand,
    SlotsEvent,
    StopCommand,
    SubmitCommand,
    WorkerEvent,
)

MAX_FAILED_STARTS = 3


class WorkerHost(Protocol):
    """The driver's view of one worker."""

    started: bool
    current: SubmitCommand | JudgeCommand | None

    def send(self, message: FrozenValue) -> None:
        """Send a command; a worker that just died is noticed by `next_event`."""


H = TypeVar("H", bound=WorkerHost)


class HostedEngine(Generic[H]):
    """An engine's orders, each for the host of a worker."""

    def __init__(self) -> None:
        self._hosts: dict[int, H] = {}
        self._failed_starts = 0

    def probe(self, worker: int, probe: ProbeCommand | CheckCommand) -> None:
        """See Engine."""
        self._hosts[worker].send(probe)

    def submit(self, worker: int, submit: SubmitCommand) -> None:
        """See Engine."""
        self._hosts[worker].current = submit
        self._hosts[worker].send(submit)

    def test(self, worker: int, test: JudgeCommand) -> None:
        """See Engine."""
        self._hosts[worker].current = test
        self._hosts[worker].send(test)

    def stop(self, trial: str, cause: StopCause) -> None:
        """See Engine."""
        for host in self._hosts.values():
            if host.current is not None and host.current.trial == trial:
                host.send(StopCommand(trial=trial, cause=cause))

    def _heard(self, host: H, event: WorkerEvent) -> None:
        """Take note of what an event says about its host."""
        if isinstance(event, SlotsEvent):
            host.started = True
            self._failed_starts = 0
        elif isinstance(event, EndedEvent | JudgedEvent):
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
