"""The local engine: persistent spawned processes, one per device or CPU share.

Each worker leads its own session (a Ctrl-C in the terminal reaches the driver only), prints into its
own log file, and ends itself when its pipe to the driver breaks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from sweeper.errors import WorkerError
from sweeper.outcome import StopCause, Value
from sweeper.settings import Workers
from sweeper.workers.protocol import (
    COMMANDS,
    EVENTS,
    AnyCommand,
    AnyEvent,
    Close,
    Ended,
    Lost,
    Probe,
    Slots,
    Stop,
    Submit,
    Test,
    Tested,
)
from sweeper.workers.worker import Orders, make_runner, serve

CLOSE_SECONDS = 5.0
MAX_FAILED_STARTS = 3
LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class PipeChannel:
    """The worker's end of a pipe."""

    connection: Connection

    def send(self, message: Value) -> None:
        """See Channel."""
        self.connection.send_bytes(message.model_dump_json().encode())

    def receive(self) -> AnyCommand:
        """See Channel."""
        return COMMANDS.validate_json(self.connection.recv_bytes())


@dataclass
class Host:
    """The driver's view of one worker process."""

    process: SpawnProcess
    connection: Connection
    log: Path
    started: bool = False
    current: Submit | Test | None = None

    def send(self, message: Value) -> None:
        """Send a command; a worker that just died is noticed by `next_event`."""
        with suppress(OSError):
            self.connection.send_bytes(message.model_dump_json().encode())

    def kill(self) -> None:
        """End the process and everything it started."""
        with suppress(ProcessLookupError):
            if self.process.pid is not None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


class LocalEngine:
    """`n_jobs` worker processes; a dead one is replaced at once."""

    def __init__(self, workers: Workers, n_jobs: int, log: Callable[[int], Path]) -> None:
        self._workers = workers
        self._n_jobs = n_jobs
        self._log = log
        self._failed_starts = 0
        self._hosts = {worker: self._start(worker) for worker in range(n_jobs)}

    def probe(self, worker: int, probe: Probe) -> None:
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

    def next_event(self, timeout_s: float) -> AnyEvent | None:
        """See Engine."""
        connections = {host.connection: worker for worker, host in self._hosts.items()}
        for ready in wait(list(connections), timeout_s):
            assert isinstance(ready, Connection)
            return self._event(connections[ready])
        return None

    def close(self) -> None:
        """See Engine."""
        for host in self._hosts.values():
            host.send(Close())
        for host in self._hosts.values():
            if host.current is None:
                host.process.join(CLOSE_SECONDS)
            host.kill()

    def _event(self, worker: int) -> AnyEvent:
        host = self._hosts[worker]
        try:
            event = EVENTS.validate_json(host.connection.recv_bytes())
        except (EOFError, OSError):
            return self._replace(worker)
        if isinstance(event, Slots):
            host.started = True
            self._failed_starts = 0
        elif isinstance(event, Ended | Tested):
            host.current = None
        return event

    def _replace(self, worker: int) -> Lost:
        host = self._hosts.pop(worker)
        host.process.join(CLOSE_SECONDS)
        code = host.process.exitcode
        host.kill()
        tail = _tail(host.log)
        if not host.started:
            self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(f"worker {worker} dies before it can start:\n{tail}")
        self._hosts[worker] = self._start(worker)
        current = host.current
        return Lost(
            worker=worker,
            trial=current.trial if current else None,
            attempt=current.attempt if current else 0,
            message=f"worker {worker} ended with exit code {code}\n{tail}",
        )

    def _start(self, worker: int) -> Host:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = self._log(worker)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(
            target=_main,
            args=(theirs, worker, self._workers.model_dump_json(), self._n_jobs, str(log)),
            name=f"sweeper-worker-{worker}",
        )
        process.start()
        theirs.close()
        return Host(process, ours, log)


def _main(connection: Connection, worker: int, workers: str, n_jobs: int, log: str) -> None:
    """The worker process from birth to death."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Path(log).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # OpenMP threads that spin while they wait make a trial several times slower when anything else runs
    # on the same cores (benchmarks/wait_policy.py); read once, when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = Workers.model_validate_json(workers)
    channel = PipeChannel(connection)
    orders = Orders.listen(channel)  # before the slow imports: the driver may die meanwhile
    serve(channel, orders, make_runner(settings, worker, n_jobs), worker)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-LOG_TAIL_LINES:])
