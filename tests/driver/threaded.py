"""An engine of several fake workers in this process, each as fast as a test wants it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sweeper.config.settings import WorkerSettings
from sweeper.core.value import FrozenValue
from sweeper.workers.fake_runner import FakeRunner
from sweeper.workers.hosted_engine import HostedEngine
from sweeper.workers.inline_engine import QueueChannel
from sweeper.workers.protocol import (
    EVENTS,
    CloseCommand,
    EndedEvent,
    SlotsEvent,
    SubmitCommand,
    Work,
    WorkAnswer,
    WorkerEvent,
)
from sweeper.workers.worker import CommandQueue, serve

PATIENCE_S = 60.0
StepSeconds = Callable[[str], float]
"""Takes a trial's key and returns the seconds of each of its steps."""


@dataclass(eq=False)
class ThreadHost:
    """One worker thread."""

    down: queue.Queue[str] = field(default_factory=queue.Queue)
    started: bool = False
    current: Work | None = None
    killed_for: str | None = None
    runner: FakeRunner | None = None

    def send(self, message: FrozenValue) -> None:
        """See WorkerHost."""
        self.down.put(message.model_dump_json())


class ThreadedEngine(HostedEngine[ThreadHost]):
    """Hosts `n_jobs` fake workers in threads, and measures how long they had nothing to do."""

    def __init__(
        self,
        workers: WorkerSettings,
        n_jobs: int,
        step_seconds: StepSeconds,
        after: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            workers: the settings of the fake trainer.
            n_jobs: the number of workers.
            step_seconds: takes a trial's key.
            after: trials that last until another one has ended, or for PATIENCE_S, by their keys.
        """
        super().__init__()
        self._after = after
        self._held: dict[str, tuple[int, Work, float]] = {}
        self._fake = workers.fake
        self._step_seconds = step_seconds
        self._arrived: queue.Queue[tuple[int, str]] = queue.Queue()
        self.free_since: dict[int, float] = {}
        self.idle_s: list[float] = []
        """Seconds between the end of each worker's trial and the begin of its next one."""
        self.order: list[str] = []
        """The begins and ends of the trials as they were sent and heard."""
        self._hosts = {worker: self._start(worker) for worker in range(n_jobs)}

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        if isinstance(work, SubmitCommand):
            self.order.append(f"{work.job} begins")
            pace = self._step_seconds(work.job)
            fake = self._fake.model_copy(update={"step_seconds": pace})
            runner = self._hosts[worker].runner
            assert runner is not None
            runner._settings = fake
            if worker in self.free_since:
                self.idle_s.append(time.monotonic() - self.free_since[worker])
            if work.job in self._after:
                self._held[self._after[work.job]] = worker, work, time.monotonic()
                return
        super().send(worker, work)

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        raise AssertionError("no test of this engine kills")

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        for awaited, (worker, work, since) in list(self._held.items()):
            if f"{awaited} ends" in self.order or time.monotonic() > since + PATIENCE_S:
                del self._held[awaited]
                super().send(worker, work)
        try:
            worker, text = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None
        event = EVENTS.validate_json(text)
        self._heard(self._hosts[worker], event)
        if isinstance(event, EndedEvent):
            self.order.append(f"{event.job} ends")
        if isinstance(event, WorkAnswer | SlotsEvent):
            self.free_since[worker] = time.monotonic()
        return event

    def close(self) -> None:
        """See Engine."""
        for host in self._hosts.values():
            host.send(CloseCommand())

    def _start(self, worker: int) -> ThreadHost:
        host = ThreadHost(runner=FakeRunner(self._fake))
        channel = QueueChannel(host.down, lambda text: self._arrived.put((worker, text)))
        threading.Thread(target=_serve, args=(channel, host.runner, worker), daemon=True).start()
        return host


def _serve(channel: QueueChannel, runner: FakeRunner, worker: int) -> None:
    serve(channel, CommandQueue.listen(channel), runner, worker)


def opener(
    step_seconds: StepSeconds,
    opened: list[ThreadedEngine] | None = None,
    after: Mapping[str, str] = MappingProxyType({}),
) -> Callable[..., ThreadedEngine]:
    """Return a replacement of `open_engine`."""

    def open_engine(
        workers: WorkerSettings, n_jobs: int, *rest: object, **more: object
    ) -> ThreadedEngine:
        engine = ThreadedEngine(workers, n_jobs, step_seconds, after)
        if opened is not None:
            opened.append(engine)
        return engine

    return open_engine
