"""The inline engine: the worker as a thread of this process, for debugging."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

from sweeper.outcome import StopCause, Value
from sweeper.settings import Workers
from sweeper.workers.protocol import (
    COMMANDS,
    EVENTS,
    AnyCommand,
    AnyEvent,
    Close,
    Probe,
    Stop,
    Submit,
    Test,
)
from sweeper.workers.worker import Farewell, Orders, make_runner, serve


@dataclass(frozen=True)
class QueueChannel:
    """The worker's end of two queues; messages go through JSON, as between processes."""

    down: queue.Queue[str]
    up: queue.Queue[str]

    def send(self, message: Value) -> None:
        """See Channel."""
        self.up.put(message.model_dump_json())

    def receive(self) -> AnyCommand:
        """See Channel."""
        return COMMANDS.validate_json(self.down.get())


class InlineEngine:
    """One worker thread. It cannot be killed: `close` waits for nothing and the thread is a daemon."""

    def __init__(self, workers: Workers) -> None:
        self._channel = QueueChannel(queue.Queue(), queue.Queue())
        threading.Thread(target=self._serve, args=(workers,), daemon=True).start()

    def _serve(self, workers: Workers) -> None:
        runner = make_runner(workers, worker=0, n_jobs=1)
        orders = Orders.listen(self._channel)
        while serve(self._channel, orders, runner, worker=0) is not Farewell.CLOSED:
            pass  # out of memory: a process would be replaced, a thread can only start over

    def probe(self, worker: int, probe: Probe) -> None:
        """See Engine."""
        self._send(probe)

    def submit(self, worker: int, submit: Submit) -> None:
        """See Engine."""
        self._send(submit)

    def test(self, worker: int, test: Test) -> None:
        """See Engine."""
        self._send(test)

    def stop(self, trial: str, cause: StopCause) -> None:
        """See Engine."""
        self._send(Stop(trial=trial, cause=cause))

    def next_event(self, timeout_s: float) -> AnyEvent | None:
        """See Engine."""
        try:
            return EVENTS.validate_json(self._channel.up.get(timeout=timeout_s))
        except queue.Empty:
            return None

    def close(self) -> None:
        """See Engine."""
        self._send(Close())

    def _send(self, message: Value) -> None:
        self._channel.down.put(message.model_dump_json())
