"""An engine without workers, for tests of the dispatcher."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from sweeper.core.outcome import StopCause
from sweeper.workers.protocol import SlotsEvent, Work, WorkerEvent

Script = Callable[[int, Work], Sequence[WorkerEvent]]


class ScriptedEngine:
    """Answers each piece of work with the events that a script makes of it."""

    def __init__(self, script: Script, workers: int = 1) -> None:
        """
        Args:
            script: takes the worker and its work; the events it returns are sent in this order.
            workers: how many announce a slot.
        """
        self._script = script
        self._events: deque[WorkerEvent] = deque(
            SlotsEvent(worker=worker, free=1) for worker in range(workers)
        )
        self.sent: list[Work] = []
        self.stopped: list[tuple[str, StopCause]] = []
        self.closed = False

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        self.sent.append(work)
        self._events.extend(self._script(worker, work))

    def proceed(self, job: str, step: int) -> None:
        """See Engine."""

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""
        self.stopped.append((job, cause))

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        raise AssertionError("no test of this engine kills")

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        """See Engine."""
        self.closed = True
