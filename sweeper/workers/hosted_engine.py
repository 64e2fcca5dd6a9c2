"""The part that engines of several workers share: each worker's current work, and failed starts."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from sweeper.core.errors import WorkerError
from sweeper.core.outcome import StopCause
from sweeper.core.value import FrozenValue
from sweeper.workers.protocol import (
    ProceedCommand,
    SlotsEvent,
    StopCommand,
    Work,
    WorkAnswer,
    WorkerEvent,
)

MAX_FAILED_STARTS = 3
"""Workers in a row that may die while they start. As with the attempts of a job, a third one is no
chance."""


class WorkerHost(Protocol):
    """The driver's view of one worker."""

    started: bool
    current: Work | None
    killed_for: str | None

    def send(self, message: FrozenValue) -> None:
        """Send a command. The death of the worker is noticed by `next_event`."""


H = TypeVar("H", bound=WorkerHost)


class HostedEngine(Generic[H]):
    """An engine that passes each order to the host of its worker."""

    def __init__(self) -> None:
        self._hosts: dict[int, H] = {}
        self._failed_starts = 0

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        self._hosts[worker].current = work
        self._hosts[worker].send(work)

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""
        for host in self._hosts.values():
            if host.current is not None and host.current.job == job:
                host.send(StopCommand(job=job, cause=cause))

    def proceed(self, job: str, step: int) -> None:
        """See Engine."""
        for host in self._hosts.values():
            if host.current is not None and host.current.job == job:
                host.send(ProceedCommand(job=job, step=step))

    def _heard(self, host: H, event: WorkerEvent) -> None:
        """Update a host from an event of its worker."""
        if isinstance(event, SlotsEvent):
            host.started = True
            self._failed_starts = 0
        elif isinstance(event, WorkAnswer):
            host.current = None

    def _died(self, worker: int, host: H, words: str) -> None:
        """Count a worker that died before it announced a slot, unless the driver killed it.

        Raises:
            WorkerError: MAX_FAILED_STARTS workers in a row died while they started.
        """
        # a pause kills workers that still start: that says nothing about the next start
        if not host.started and host.killed_for is None:
            self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(f"worker {worker} dies before it can start:\n{words}")
