"""The workers of a run: the engine that hosts them, and their free slots."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from sweeper.workers.protocol import Engine, LostEvent, SlotsEvent, WorkerEvent


class WorkerPool:
    """A context manager that closes its engine whatever happens inside."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._free: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine that hosts the workers."""
        assert self._engine is not None, "no engine was opened for this pool"
        return self._engine

    def host_with(self, engine: Engine) -> None:
        """Use this engine from now on. An earlier one must be closed first."""
        assert self._engine is None, "the earlier engine still holds its devices"
        self._engine = engine

    def close(self) -> None:
        """End all workers."""
        engine, self._engine = self._engine, None
        self._free.clear()
        if engine is not None:
            engine.close()

    def free_workers(self) -> list[int]:
        """Return the worker of each free slot."""
        return [worker for worker, free in self._free.items() for _ in range(free)]

    def occupy(self, worker: int) -> None:
        """Use up one free slot of a worker."""
        self._free[worker] -= 1

    def note(self, event: WorkerEvent) -> None:
        """Update the free slots from an event."""
        if isinstance(event, SlotsEvent):
            self._free[event.worker] = event.free
        elif isinstance(event, LostEvent):
            self._free.pop(event.worker, None)  # the successor announces its own slots

    def kill(self, worker: int, reason: str) -> None:
        """End a worker. It takes no job until its loss has arrived and its successor has a slot."""
        self._free.pop(worker, None)
        self.engine.kill(worker, reason)

    def kill_all(self, reason: str) -> None:
        """End every worker that has announced itself. Their successors start without a model."""
        for worker in list(self._free):
            self.kill(worker, reason)
