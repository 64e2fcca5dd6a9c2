"""The worker's side: take commands from a channel, run trials, send events.

Touches neither the study nor MLflow. Ends itself when its driver is gone.
"""

from __future__ import annotations

import errno
import os
import queue
import shutil
import threading
import time
import traceback
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from sweeper.config.settings import WorkerSettings
from sweeper.core.errors import DoesNotFit, SweeperError, WorkerError
from sweeper.core.outcome import ArmBaseline, HeldOutLosses, Outcome, StopCause, TrialSize
from sweeper.core.paths import TrialFolder
from sweeper.core.redaction import redact
from sweeper.core.value import FrozenValue, MemoryShortfall
from sweeper.workers.devices import devices_of, see_only
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    CloseCommand,
    EndedEvent,
    EvaluatedEvent,
    JudgeCommand,
    JudgedEvent,
    ProbeCommand,
    ProbedEvent,
    ProgressEvent,
    SlotsEvent,
    StopCommand,
    SubmitCommand,
    TrialRunner,
    WaitingEvent,
    WorkerCommand,
)

TRACEBACK_LINES = 30
FULL_BYTES = 2**20
FULL_DISK_WAIT_S = 2.0
FULL_DISK_PATIENCE_S = 15 * 60.0
"""As long as the driver waits for its database, which often lies on the same disk."""


class WorkerChannel(Protocol):
    """One end of a two-way line to the driver."""

    def send(self, message: FrozenValue) -> None:
        """Send an event; never blocks for long."""

    def receive(self) -> WorkerCommand:
        """Wait for a command; raises EOFError when the driver is gone."""


@dataclass
class CommandQueue:
    """Commands sorted by a reader thread: work waits its turn, stops take effect at once."""

    work: queue.Queue[SubmitCommand | JudgeCommand | ProbeCommand | CheckCommand | CloseCommand] = (
        field(default_factory=queue.Queue)
    )
    stops: dict[str, StopCause] = field(default_factory=dict)

    @classmethod
    def listen(cls, channel: WorkerChannel) -> CommandQueue:
        """Start reading a channel in the background."""
        orders = cls()
        threading.Thread(target=orders._read, args=(channel,), daemon=True).start()
        return orders

    def _read(self, channel: WorkerChannel) -> None:
        """Read for ever; a driver that is gone leaves no reason to go on computing."""
        try:
            while True:
                command = channel.receive()
                if isinstance(command, StopCommand):
                    self.stops[command.trial] = command.cause
                else:
                    if isinstance(
                        command, SubmitCommand
                    ):  # an older stop was for an earlier attempt
                        self.stops.pop(command.trial, None)
                    self.work.put(command)
                    if isinstance(command, CloseCommand):
                        return
        except (EOFError, OSError):
            os._exit(1)  # nothing to save: checkpoints are on disk, the spool is flushed
        except Exception:  # noqa: BLE001 - without its reader a worker would wait for ever
            traceback.print_exc()
            os._exit(1)


@dataclass(frozen=True)
class RemoteObserver:
    """An observer whose other side is the driver."""

    channel: WorkerChannel
    orders: CommandQueue
    trial: str
    attempt: int

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """See Observer."""
        self.channel.send(
            ProgressEvent(
                trial=self.trial,
                attempt=self.attempt,
                step=step,
                total_steps=total_steps,
                tokens_per_second=tokens_per_second,
            )
        )

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """See Observer."""
        self.channel.send(
            EvaluatedEvent(
                trial=self.trial,
                attempt=self.attempt,
                step=step,
                total_steps=total_steps,
                value=value,
            )
        )

    def stop_cause(self) -> StopCause | None:
        """See Observer."""
        return self.orders.stops.get(self.trial)


@dataclass(frozen=True)
class WorkerResources:
    """What a worker has been given."""

    log: Path
    devices: int = 1


class ExitReason(Enum):
    """Why a worker ended by itself."""

    CLOSED = "closed"
    MEMORY = "its successor starts with clean memory"


def serve(
    channel: WorkerChannel, orders: CommandQueue, runner: TrialRunner, worker: int
) -> ExitReason:
    """Run commands one after the other until told to close, or until memory ran out or is lost.

    After an out-of-memory outcome the worker ends, so that its successor starts with clean memory.
    """
    patience = DiskPatience()
    while True:
        channel.send(SlotsEvent(worker=worker, free=1))
        command = orders.work.get()
        if isinstance(command, CloseCommand):
            return ExitReason.CLOSED
        if isinstance(command, ProbeCommand):
            channel.send(_probed(command, runner))
            continue
        if isinstance(command, CheckCommand):
            channel.send(_checked(command, runner, worker))
            continue
        if isinstance(command, JudgeCommand):
            channel.send(_tested(command, runner))
            continue
        outcome = _outcome(command, runner, channel, orders, patience)
        channel.send(EndedEvent(trial=command.trial, attempt=command.attempt, outcome=outcome))
        if outcome.cause == "oom" or runner.worn_out:
            return ExitReason.MEMORY


def make_runner(
    workers: WorkerSettings, worker: int, threads: int, place: WorkerResources
) -> TrialRunner:
    """The runner of `workers.trainer`; heavy imports happen here, in the worker.

    Args:
        workers: who trains.
        worker: its number.
        threads: CPU threads of each of its processes.
        place: its devices, and where their followers print.
    """
    # OpenMP threads that spin while they wait make a trial several times slower when anything else runs
    # on the same cores (benchmarks/wait_policy.py); read once, when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if workers.trainer == "fake":
        from sweeper.workers.fake_runner import FakeRunner

        return FakeRunner(workers.fake)
    first, *others = devices_of(worker, place.devices)
    see_only(first)
    from sweeper.training.trial_runner import TransformersRunner
    from sweeper.workers.followers import FollowerGroup

    return TransformersRunner(threads, FollowerGroup(others, threads, place.log).join)


def _probed(command: ProbeCommand, runner: TrialRunner) -> ProbedEvent:
    facts: ArmBaseline | None = None
    message: str | None = None
    misfit: MemoryShortfall | None = None
    try:
        facts = runner.probe(command.settings, command.adopted)
    except SweeperError as error:
        message = str(error)
        misfit = error.misfit if isinstance(error, DoesNotFit) else None
    except Exception:  # noqa: BLE001 - the worker's edge: the driver shows it
        message = _traceback()
    return ProbedEvent(arm=command.arm, facts=facts, message=message, misfit=misfit)


def _checked(command: CheckCommand, runner: TrialRunner, worker: int) -> CheckedEvent:
    size: TrialSize | None = None
    refusal: Outcome | None = None
    try:
        size = runner.check(command.settings)
    except SweeperError as error:
        refusal = Outcome(cause="refused", message=str(error))
    except Exception:  # noqa: BLE001 - the worker's edge: one trial's error must not end the worker
        refusal = Outcome(cause="error", message=_traceback())
    return CheckedEvent(worker=worker, size=size, refusal=refusal)


def _tested(command: JudgeCommand, runner: TrialRunner) -> JudgedEvent:
    losses: HeldOutLosses | None = None
    message: str | None = None
    try:
        folder = None if command.folder is None else TrialFolder(command.folder)
        losses = runner.test(command.settings, folder, command.kinds)
    except SweeperError as error:
        message = str(error)
    except Exception:  # noqa: BLE001 - the worker's edge: the driver shows it
        message = _traceback()
    return JudgedEvent(trial=command.trial, attempt=command.attempt, losses=losses, message=message)


@dataclass
class DiskPatience:
    """How long a worker has waited for a disk that stays full, over all the trials it was given."""

    waited_s: float = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether the next trial would wait in vain as well."""
        return self.waited_s > FULL_DISK_PATIENCE_S

    def wait(self) -> None:
        """For a moment."""
        time.sleep(FULL_DISK_WAIT_S)
        self.waited_s += FULL_DISK_WAIT_S


def _outcome(
    command: SubmitCommand,
    runner: TrialRunner,
    channel: WorkerChannel,
    orders: CommandQueue,
    patience: DiskPatience,
) -> Outcome:
    """Run a trial; on a full disk it waits, and then continues from its newest whole checkpoint."""
    observer = RemoteObserver(channel, orders, command.trial, command.attempt)
    folder = TrialFolder(command.folder)
    told = False
    while True:
        try:
            outcome = _run(command, runner, folder, observer)
        except WorkerError:
            raise  # not the trial's fault: the worker ends, and the trial continues on its successor
        except Exception as error:  # noqa: BLE001 - the worker's edge: one trial must not end the worker
            if not disk_full(error, folder.path):
                return Outcome(cause="error", message=_traceback())
        else:
            patience.waited_s = 0.0
            return outcome
        if not told:
            message = f"the disk of {folder.path} is full; waiting for space"
            channel.send(
                WaitingEvent(trial=command.trial, attempt=command.attempt, message=message)
            )
            told = True
        if patience.exhausted:
            return Outcome(cause="error", message=f"the disk stays full: {folder.path}")
        patience.wait()
        if (cause := observer.stop_cause()) is not None:
            return Outcome(cause=cause, message="stopped while the disk was full")


def _run(
    command: SubmitCommand, runner: TrialRunner, folder: TrialFolder, observer: RemoteObserver
) -> Outcome:
    if command.adopted is not None:
        return runner.adopt(command.settings, folder, command.provenance, command.adopted)
    return runner.run(command.settings, folder, command.provenance, observer)


def disk_full(error: Exception, folder: Path) -> bool:
    """Whether a trial failed for want of space; safetensors and torch have errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return shutil.disk_usage(folder if folder.exists() else folder.parent).free < FULL_BYTES


def _traceback() -> str:
    return redact("\n".join(traceback.format_exc().splitlines()[-TRACEBACK_LINES:]))
