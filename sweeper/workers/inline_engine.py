"""The inline engine: the worker as a thread of this process, for debugging."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeper.config.settings import WorkerSettings
from sweeper.core.device_failures import cause_of_death
from sweeper.core.errors import WorkerError
from sweeper.core.outcome import StopCause
from sweeper.core.value import FrozenValue
from sweeper.workers.protocol import (
    COMMANDS,
    EVENTS,
    CloseCommand,
    LostEvent,
    ProceedCommand,
    StopCommand,
    Work,
    WorkAnswer,
    WorkerCommand,
    WorkerEvent,
    lost,
)
from sweeper.workers.worker import CommandQueue, ExitReason, WorkerResources, make_runner, serve


@dataclass(frozen=True)
class QueueChannel:
    """The worker's end of two queues. Messages pass as JSON, as between processes."""

    down: queue.Queue[str]
    up: Callable[[str], None]

    def send(self, message: FrozenValue) -> None:
        """See WorkerChannel."""
        self.up(message.model_dump_json())

    def receive(self) -> WorkerCommand:
        """See WorkerChannel."""
        return COMMANDS.validate_json(self.down.get())


class InlineEngine:
    """One worker thread. A killed thread runs on as a daemon, but its events are no longer read."""

    def __init__(self, workers: WorkerSettings) -> None:
        self._workers = workers
        self._current: Work | None = None
        self._start()

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        self._current = work
        self._order(work)

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""
        self._order(StopCommand(job=job, cause=cause))

    def proceed(self, job: str, step: int) -> None:
        """See Engine."""
        self._order(ProceedCommand(job=job, step=step))

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        sent = list(self._up.queue)
        # an answer that waits to be read has freed the worker already
        answered = any(isinstance(EVENTS.validate_json(text), WorkAnswer) for text in sent)
        current = None if answered else self._current
        self._start((*sent, lost(0, current, reason, reason).model_dump_json()))

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        try:
            event = EVENTS.validate_json(self._up.get(timeout=timeout_s))
        except queue.Empty:
            return None
        if isinstance(event, LostEvent) and event.job is None and self._current is not None:
            work = {"job": self._current.job, "attempt": self._current.attempt}
            event = event.model_copy(update=work)
        if isinstance(event, WorkAnswer | LostEvent):
            self._current = None
        return event

    def close(self) -> None:
        """See Engine."""
        self._order(CloseCommand())

    def _start(self, sent: Sequence[str] = ()) -> None:
        """Start a thread with its own queues, after the unread events of the old thread."""
        self._down: queue.Queue[str] = queue.Queue()
        self._up: queue.Queue[str] = queue.Queue()
        for text in sent:
            self._up.put(text)
        channel = QueueChannel(self._down, self._up.put)
        threading.Thread(target=_serve, args=(self._workers, channel), daemon=True).start()

    def _order(self, message: FrozenValue) -> None:
        self._down.put(message.model_dump_json())


def _serve(workers: WorkerSettings, channel: QueueChannel) -> None:
    runner = make_runner(
        # the thread prints where this process prints, so it has no log
        workers,
        worker=0,
        threads=os.cpu_count() or 1,
        place=WorkerResources(Path(os.devnull)),
    )
    orders = CommandQueue.listen(channel)
    ended: ExitReason | None = None
    while ended is not ExitReason.CLOSED:
        try:
            # After out of memory a process would be replaced. A thread can only start over
            ended = serve(channel, orders, runner, worker=0)
        except WorkerError as error:
            words = f"the worker ended: {error}"
            channel.send(lost(0, None, None, words, cause_of_death(words)))
