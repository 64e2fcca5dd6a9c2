"""The other processes of a trial that trains on several devices.

A worker leads. Each follower has a device and a copy of the base of its own, and takes part in one trial
after the other. Followers live in the worker's session and end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import ConfigError, InputsChanged, WorkerError
from sweeper.core.garbage import exempt_from_collection, uncollected
from sweeper.core.input_digests import InputDigests
from sweeper.core.signals import NOTICES, STOPS, die_with_parent
from sweeper.core.value import FrozenValue
from sweeper.training.distributed import (
    SINGLE_PROCESS,
    RankGroup,
    join_rendezvous,
    open_rendezvous,
    process_group,
)
from sweeper.training.micro_batch import out_of_memory
from sweeper.workers.devices import see_devices
from sweeper.workers.worker_log import print_into, tail_of

END_SECONDS = 60.0
"""Time limit of a follower to end its part after the leader has ended its own."""
REPORT_SECONDS = 5.0
"""Time limit of a follower to report why an exchange with it failed."""
REAP_SECONDS = 1.0
"""Seconds to wait for the end of a process that was killed. A judgement: the kernel needs
milliseconds."""
OUT_OF_MEMORY = "out of memory"


class FollowCommand(FrozenValue):
    """Take part in this trial."""

    settings: TrialSettings
    checkpoints: Path
    rank: int
    size: int
    port: int
    expected: InputDigests
    """Digests of what the leader has loaded."""


class FollowEnded(FrozenValue):
    """A follower ended its part of the trial. `problem` is the last line of its error, if any."""

    problem: str | None = None
    changed: str | None = None
    """Differences between what the follower and the leader have loaded, if any."""


@dataclass
class FollowerProcess:
    """The leader's view of one follower."""

    process: SpawnProcess
    connection: Connection
    log: Path

    def report(self, wait_s: float) -> FollowEnded | None:
        """Return the follower's report, or None if it sent none in time or died."""
        with suppress(EOFError, OSError):
            if self.connection.poll(wait_s):
                return FollowEnded.model_validate_json(self.connection.recv_bytes())
        return None

    def kill(self) -> None:
        """End the follower."""
        self.process.kill()
        self.process.join(REAP_SECONDS)
        self.connection.close()


class FollowerGroup:
    """The followers of one worker, started with the first trial that needs them."""

    def __init__(self, devices: Sequence[str | None], threads: int, log: Path) -> None:
        """
        Args:
            devices: the GPU of each rank as CUDA_VISIBLE_DEVICES names it, or None for CPUs. The
                first is the leader's.
            threads: CPU threads of each follower.
            log: the worker's log. The followers' logs lie in the same folder.
        """
        self._devices = devices
        self._threads = threads
        self._log = log
        self._followers: dict[int, FollowerProcess] = {}

    @contextmanager
    def join(
        self, settings: TrialSettings, checkpoints: Path, found: InputDigests
    ) -> Iterator[RankGroup]:
        """See Join.

        Raises:
            ConfigError: the trial wants more devices than this worker has.
            MemoryError: a follower ran out of memory.
            InputsChanged: a follower found other data or another base model than this process.
            WorkerError: a follower failed or died, and this worker is of no further use.
        """
        size = settings.training.devices_per_trial
        if size == 1:
            yield SINGLE_PROCESS
            return
        if size > len(self._devices):
            raise ConfigError([_too_many(size, len(self._devices))])
        rendezvous = open_rendezvous(size)
        for rank in range(1, size):
            follow = FollowCommand(
                settings=settings,
                checkpoints=checkpoints,
                rank=rank,
                size=size,
                port=rendezvous.port,
                expected=found,
            )
            self._follower(rank).connection.send_bytes(follow.model_dump_json().encode())
        try:
            with process_group(0, size, rendezvous) as ranks:
                yield ranks
            self._hear_all(size)
        except BaseException as error:
            self._end(error)
            raise

    def close(self) -> None:
        """End all followers."""
        for follower in self._followers.values():
            follower.kill()
        self._followers.clear()

    def _follower(self, rank: int) -> FollowerProcess:
        if rank not in self._followers:
            # spawn, because a forked process cannot use CUDA
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            log = self._log.with_stem(f"{self._log.stem}_rank_{rank}")
            process = multiprocessing.get_context("spawn").Process(
                target=_main,
                args=(theirs, rank, self._devices, self._threads, str(log)),
                name=f"{self._log.stem}-rank-{rank}",
            )
            process.start()
            # else a read from the pipe would not end with the follower
            theirs.close()
            self._followers[rank] = FollowerProcess(process, ours, log)
        return self._followers[rank]

    def _hear_all(self, size: int) -> None:
        for rank in range(1, size):
            report = self._followers[rank].report(END_SECONDS)
            if report is None or report.problem:
                raise WorkerError(f"rank {rank} did not end its part of the trial")

    def _end(self, error: BaseException) -> None:
        """End all followers after a failure, which leaves them in an unknown state.

        Raises:
            MemoryError: a follower's memory ran out, which is why the leader's exchange failed.
            InputsChanged: a follower has loaded other data or another base model.
            WorkerError: a follower failed otherwise, or died.
        """
        followers, self._followers = self._followers, {}
        exchange_failed = isinstance(error, RuntimeError) and not out_of_memory(error)
        wait_s = REPORT_SECONDS if exchange_failed else 0.0
        reports = {rank: follower.report(wait_s) for rank, follower in followers.items()}
        words = [
            _fate(rank, follower, reports[rank], wait_s) for rank, follower in followers.items()
        ]
        for follower in followers.values():
            follower.kill()
        if not exchange_failed:
            return
        for report in reports.values():
            if report is not None and report.changed is not None:
                raise InputsChanged(report.changed) from error
        if any(OUT_OF_MEMORY in fate for fate in words):
            raise MemoryError("; ".join(words)) from error
        raise WorkerError("\n".join([str(error), *words])) from error


def _fate(rank: int, follower: FollowerProcess, report: FollowEnded | None, wait_s: float) -> str:
    """Return a description of a follower's state, before it is killed."""
    if report is not None and report.problem:
        return f"rank {rank}: {report.problem}"
    follower.process.join(min(wait_s, REAP_SECONDS))  # its sockets close before it counts as dead
    state = "waits" if follower.process.is_alive() else f"died\n{tail_of(follower.log)}"
    return f"rank {rank} {state}"


def _too_many(size: int, have: int) -> str:
    return (
        f"training.devices_per_trial={size}: this worker has {have} "
        f"{'device' if have == 1 else 'devices'}, and workers=inline trains on one"
    )


def _main(
    connection: Connection, rank: int, devices: Sequence[str | None], threads: int, log: str
) -> None:
    """Run a follower from its start to its end."""
    die_with_parent()
    for number in (*STOPS, *NOTICES):  # the driver decides
        signal.signal(number, signal.SIG_IGN)
    print_into(Path(log))
    see_devices(devices[rank], [*devices[:rank], *devices[rank + 1 :]])
    work: queue.Queue[FollowCommand] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, work), daemon=True).start()
    from sweeper.modeling.lean_imports import lean_imports

    with uncollected(), lean_imports():
        from sweeper.modeling.hardware import prepare_device
        from sweeper.training.trial_runner import TransformersRunner
    prepare_device(devices[rank])
    exempt_from_collection()
    runner = TransformersRunner(threads=threads)
    while True:
        follow = work.get()
        try:
            rendezvous = join_rendezvous(follow.size, follow.port)
            with process_group(follow.rank, follow.size, rendezvous) as ranks:
                runner.follow(follow.settings, follow.checkpoints, ranks, follow.expected)
        except BaseException as error:  # noqa: BLE001 - said to the leader, who decides
            traceback.print_exc()
            words = f"{OUT_OF_MEMORY}: " if out_of_memory(error) else ""
            changed = str(error) if isinstance(error, InputsChanged) else None
            problem = f"{words}{type(error).__name__}: {error}"
            report = FollowEnded(problem=problem, changed=changed)
            connection.send_bytes(report.model_dump_json().encode())
            os._exit(1)  # the leader's exchange fails at once
        connection.send_bytes(FollowEnded().model_dump_json().encode())


def _listen(connection: Connection, work: queue.Queue[FollowCommand]) -> None:
    """Read commands for ever, and end the process when the leader is gone."""
    try:
        while True:
            work.put(FollowCommand.model_validate_json(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(1)
