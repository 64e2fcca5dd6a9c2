"""The local engine: persistent spawned processes, one per device or CPU share.

Each worker leads its own session (a Ctrl-C in the terminal reaches the driver only), prints into its
own log file, and ends itself when its pipe to the driver breaks.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from sweeper.config.settings import WorkerSettings
from sweeper.core.device_failures import cause_of_death, last_words
from sweeper.core.errors import WorkerError
from sweeper.core.garbage import exempt_from_collection
from sweeper.core.signals import NOTICES, STOPS, die_with_parent
from sweeper.core.value import FrozenValue
from sweeper.workers.device_use import free_first, users_of
from sweeper.workers.devices import DeviceSurvey, share_devices, survey_devices
from sweeper.workers.hosted_engine import HostedEngine
from sweeper.workers.protocol import (
    COMMANDS,
    EVENTS,
    CloseCommand,
    LostEvent,
    Work,
    WorkerCommand,
    WorkerEvent,
    lost,
)
from sweeper.workers.worker import CommandQueue, WorkerResources, make_runner, serve
from sweeper.workers.worker_log import begin_log, print_into, tail_of
from sweeper.workers.worker_session import lead_session

CLOSE_SECONDS = 5.0
"""Seconds that workers have to end by themselves before they are killed. A judgement: an idle one
needs a fraction of a second, and a person who pressed Ctrl-C waits for it."""
VMSTAT = Path("/proc/vmstat")

START_ATTEMPTS = 3
"""Attempts to start a process that dies while it is started."""


@dataclass(frozen=True)
class PipeChannel:
    """The worker's end of a pipe."""

    connection: Connection

    def send(self, message: FrozenValue) -> None:
        """See WorkerChannel."""
        self.connection.send_bytes(message.model_dump_json().encode())

    def receive(self) -> WorkerCommand:
        """See WorkerChannel."""
        # `recv` would unpickle, which can run any code
        return COMMANDS.validate_json(self.connection.recv_bytes())


@dataclass(eq=False)
class ProcessHost:
    """The driver's view of one worker process."""

    worker: int
    process: SpawnProcess
    connection: Connection
    log: Path
    started: bool = False
    current: Work | None = None
    killed_for: str | None = None
    reader: threading.Thread | None = None

    def listen(self, arrived: queue.Queue[tuple[ProcessHost, bytes | None]]) -> None:
        """Start to put each message of the worker into a queue, and None after its last one."""
        self.reader = threading.Thread(target=self._read, args=(arrived,), daemon=True)
        self.reader.start()

    def _read(self, arrived: queue.Queue[tuple[ProcessHost, bytes | None]]) -> None:
        with self.connection, suppress(EOFError, OSError):
            while True:
                arrived.put((self, self.connection.recv_bytes()))
        arrived.put((self, None))

    def send(self, message: FrozenValue) -> None:
        """Send a command. The death of the worker is noticed by `next_event`."""
        with suppress(OSError):
            self.connection.send_bytes(message.model_dump_json().encode())

    def kill(self) -> None:
        """End the process and everything it started. The events it sent can still be read."""
        with suppress(ProcessLookupError):
            if self.process.pid is not None:
                os.killpg(self.process.pid, signal.SIGKILL)
        # before the process leads its session there is no group to kill
        self.process.kill()

    def bury(self) -> int | None:
        """Wait for the killed process and the end of its messages, and return its exit code."""
        # a process that waits for a dead network disk ends only when the disk is back
        self.process.join(CLOSE_SECONDS)
        if self.reader is not None:
            self.reader.join(CLOSE_SECONDS)  # it closes the pipe
        return self.process.exitcode


class LocalEngine(HostedEngine[ProcessHost]):
    """An engine of `n_jobs` worker processes. A dead one is replaced at once."""

    def __init__(
        self,
        workers: WorkerSettings,
        n_jobs: int,
        devices: int,
        log: Callable[[int], Path],
        say: Callable[[str], None] = print,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._workers = workers
        self._devices = devices
        # The fake trainer of the tests uses no device
        self._survey = DeviceSurvey() if workers.trainer == "fake" else survey_devices()
        self._survey = free_first(self._survey, users_of(self._survey.names))
        for sentence in share_devices(self._survey, n_jobs, devices):
            say(sentence)
        self._threads = threads or max(1, (os.cpu_count() or 1) // (n_jobs * devices))
        self._log = log
        self._oom_kills = oom_kills()
        self._arrived: queue.Queue[tuple[ProcessHost, bytes | None]] = queue.Queue()
        """Messages of all workers in the order of their arrival, None for the end of a worker."""
        self._hosts = {worker: self._start(worker) for worker in range(n_jobs)}

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        self._hosts[worker].killed_for = reason
        self._hosts[worker].kill()

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        try:
            host, message = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            return self._replace(host.worker)
        event = EVENTS.validate_json(message)
        self._heard(host, event)
        return event

    def close(self) -> None:
        """See Engine."""
        for host in self._hosts.values():
            host.send(CloseCommand())
        deadline = time.monotonic() + CLOSE_SECONDS
        for host in self._hosts.values():
            if host.current is None:
                host.process.join(max(0.0, deadline - time.monotonic()))
            host.kill()
            host.bury()

    def _replace(self, worker: int) -> LostEvent:
        host = self._hosts.pop(worker)
        # its pipe closes a moment before it ends, and a kill would hide its own exit code
        host.process.join(CLOSE_SECONDS)
        host.kill()
        code = host.bury()
        tail = tail_of(host.log)
        self._died(worker, host, tail)
        self._hosts[worker] = self._start(worker)
        died_of = cause_of_death(tail)
        ended = f"worker {worker} ended with exit code {code}: {last_words(tail)}".rstrip(": ")
        # The code says only that somebody killed it. Linux counts its kills for memory on the whole
        # machine, so one in another container at this moment is taken for ours: it costs one point
        if code == -signal.SIGKILL and (kills := oom_kills()) > self._oom_kills:
            died_of, self._oom_kills = "oom", kills
            ended = f"worker {worker} was killed: this machine, or this container, is out of memory"
        return lost(worker, host.current, host.killed_for, f"{ended}\n{tail}", died_of)

    def _start(self, worker: int) -> ProcessHost:
        log = self._log(worker)
        begin_log(log, worker)
        problem: OSError | None = None
        for _ in range(START_ATTEMPTS):
            try:
                return self._start_once(worker, log)
            except OSError as error:  # it was killed before it had read what to run
                problem = error
        raise WorkerError(
            f"worker {worker} cannot be started, or dies before its first step ({problem}). Its log is "
            f"{log}:\n{tail_of(log)}"
        )

    def _start_once(self, worker: int, log: Path) -> ProcessHost:
        # a forked process cannot use CUDA
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_main,
            args=(
                theirs,
                worker,
                self._workers.model_dump_json(),
                self._threads,
                WorkerResources(log, self._devices, self._survey),
            ),
            name=f"sweeper-worker-{worker}",
        )
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            # a copy of the worker's end here would keep the pipe open after the worker's death
            theirs.close()
        host = ProcessHost(worker, process, ours, log)
        # In a thread: a worker that freezes within a long message must not hold up the driver
        host.listen(self._arrived)
        return host


def oom_kills() -> int:
    """Return how often Linux killed a process for lack of memory, in any container. Elsewhere 0."""
    if not VMSTAT.exists():
        return 0
    figures = dict(line.split() for line in VMSTAT.read_text(encoding="ascii").splitlines())
    return int(figures.get("oom_kill", 0))


def _main(
    connection: Connection, worker: int, workers: str, threads: int, place: WorkerResources
) -> None:
    """Run a worker process from its start to its end."""
    lead_session()
    die_with_parent()
    for number in (*STOPS, *NOTICES):  # a batch system signals every process; the driver decides
        signal.signal(number, signal.SIG_IGN)
    print_into(place.log)
    settings = WorkerSettings.model_validate_json(workers)
    channel = PipeChannel(connection)
    orders = CommandQueue.listen(channel)  # before the slow imports: the driver may die meanwhile
    runner = make_runner(settings, worker, threads, place)
    exempt_from_collection()
    serve(channel, orders, runner, worker)
