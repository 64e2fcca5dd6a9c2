"""The worker's side: takes commands from a channel, runs trials, sends events.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from sweeper.config.settings import WorkerSettings
from sweeper.core.device_failures import require_whole_context
from sweeper.core.errors import DoesNotFit, InputsChanged, SweeperError, WorkerError
from sweeper.core.garbage import uncollected
from sweeper.core.outcome import ArmBaseline, HeldOutLosses, Outcome, StopCause, TrialSize
from sweeper.core.paths import TrialFolder
from sweeper.core.redaction import redact
from sweeper.core.references import remember, remembered
from sweeper.core.stage_words import StageListener, heard_by
from sweeper.core.value import FrozenValue, MemoryShortfall
from sweeper.workers.devices import DeviceSurvey, devices_of, see_devices
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    CloseCommand,
    EndedEvent,
    EvaluatedEvent,
    InputsChangedEvent,
    JudgeCommand,
    JudgedEvent,
    ProbeCommand,
    ProbedEvent,
    ProceedCommand,
    ProgressEvent,
    SlotsEvent,
    StopCommand,
    SubmitCommand,
    TrialRunner,
    WaitingEvent,
    Work,
    WorkAnswer,
    WorkerCommand,
    WorkingEvent,
)

TRACEBACK_LINES = 30
"""Last lines of a traceback in a trial's message. A judgement: the innermost calls fit on a screen."""
FULL_BYTES = 2**20
"""Free bytes below which a failed write counts as a full disk, as in sweeper.commands.guarded_steps."""
FULL_DISK_WAIT_S = 2.0
"""Seconds between two tries to write. A judgement: space is made by a person, and a try costs
nothing."""
FULL_DISK_PATIENCE_S = 15 * 60.0
"""The driver waits as long for its database, which often lies on the same disk."""


class WorkerChannel(Protocol):
    """One end of a two-way line to the driver."""

    def send(self, message: FrozenValue) -> None:
        """Send an event without blocking for long."""

    def receive(self) -> WorkerCommand:
        """Wait for a command and return it.

        Raises:
            EOFError: the driver is gone.
        """


@dataclass
class CommandQueue:
    """Commands from a reader thread: work waits its turn, stops take effect at once."""

    work: queue.Queue[Work | CloseCommand] = field(default_factory=queue.Queue)
    stops: dict[str, StopCause] = field(default_factory=dict)
    proceeds: dict[str, int] = field(default_factory=dict)
    """The step of the newest evaluation after which each job may continue."""
    answered: threading.Condition = field(default_factory=threading.Condition)
    """Notified of each stop and each proceed."""

    @classmethod
    def listen(cls, channel: WorkerChannel) -> CommandQueue:
        """Start reading a channel in the background."""
        orders = cls()
        threading.Thread(target=orders._read, args=(channel,), daemon=True).start()
        return orders

    def _read(self, channel: WorkerChannel) -> None:
        """Read commands for ever, and end the process when the driver is gone."""
        try:
            while True:
                command = channel.receive()
                self._take(command)
                if isinstance(command, CloseCommand):
                    return
        except (EOFError, OSError):
            os._exit(1)  # nothing to save: checkpoints are on disk, the spool is flushed
        except Exception:  # noqa: BLE001 - without its reader a worker would wait for ever
            traceback.print_exc()
            os._exit(1)

    def _take(self, command: WorkerCommand) -> None:
        with self.answered:
            match command:
                case StopCommand():
                    self.stops[command.job] = command.cause
                case ProceedCommand():
                    self.proceeds[command.job] = command.step
                case SubmitCommand():  # older answers were for an earlier attempt
                    self.stops.pop(command.job, None)
                    self.proceeds.pop(command.job, None)
                    self.work.put(command)
                case _:
                    self.work.put(command)
            self.answered.notify_all()

    def wait_for_answer(self, job: str, step: int) -> None:
        """Wait until the driver has decided about a job's evaluation at a step.

        A pause or Ctrl-C does not end the wait: a trial that is hopeless would continue later.
        """
        with self.answered:
            self.answered.wait_for(
                lambda: self.stops.get(job) == "pruned" or self.proceeds.get(job) == step
            )


@dataclass(frozen=True)
class RemoteObserver:
    """An observer whose other side is the driver."""

    channel: WorkerChannel
    orders: CommandQueue
    job: str
    attempt: int
    watched: bool = False

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """See TrialObserver."""
        self.channel.send(
            ProgressEvent(
                job=self.job,
                attempt=self.attempt,
                step=step,
                total_steps=total_steps,
                tokens_per_second=tokens_per_second,
            )
        )

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """See TrialObserver."""
        self.channel.send(
            EvaluatedEvent(
                job=self.job,
                attempt=self.attempt,
                step=step,
                total_steps=total_steps,
                value=value,
            )
        )
        # A step more would be trained or not by the speed of the driver, and its cost recorded
        if self.watched:
            self.orders.wait_for_answer(self.job, step)

    def stop_cause(self) -> StopCause | None:
        """See TrialObserver."""
        return self.orders.stops.get(self.job)


@dataclass(frozen=True)
class WorkerResources:
    """The resources of a worker."""

    log: Path
    devices: int = 1
    survey: DeviceSurvey | None = None
    """The GPUs of the machine, or None if the worker finds them by itself."""
    references: Mapping[str, str] = field(default_factory=remembered)
    """Values that the worker writes as references, by variable. A cluster's node may lack these."""


class ExitReason(Enum):
    """The reason for which a worker ended by itself."""

    CLOSED = "closed"
    MEMORY = "its successor starts with clean memory"


def serve(
    channel: WorkerChannel, orders: CommandQueue, runner: TrialRunner, worker: int
) -> ExitReason:
    """Run commands one after the other until CloseCommand, or until memory ran out or is worn out.

    After an out-of-memory outcome the worker ends, so that its successor starts with clean memory.
    """
    # of the disk, not of each trial: a night of many trials would wait until the morning
    patience = DiskPatience()
    while True:
        channel.send(SlotsEvent(worker=worker, free=1))
        command = orders.work.get()
        if isinstance(command, CloseCommand):
            return ExitReason.CLOSED
        listener = _listener(channel, command)
        if not isinstance(command, SubmitCommand):
            with heard_by(listener):
                answer = _answer(command, runner)
            channel.send(answer)
            if runner.worn_out:
                return ExitReason.MEMORY
            continue
        try:
            with heard_by(listener):
                outcome = _outcome(command, runner, channel, orders, patience)
        except InputsChanged as error:
            channel.send(_changed(command, error))
            continue
        channel.send(EndedEvent(job=command.job, attempt=command.attempt, outcome=outcome))
        if outcome.cause == "oom" or runner.worn_out:
            return ExitReason.MEMORY


def _listener(channel: WorkerChannel, work: Work) -> StageListener:
    """Return a listener that sends what it hears about this work to the driver."""

    def send(words: str) -> None:
        channel.send(WorkingEvent(job=work.job, attempt=work.attempt, message=words))

    return StageListener(send)


def make_runner(
    workers: WorkerSettings, worker: int, threads: int, place: WorkerResources
) -> TrialRunner:
    """Return the runner of `workers.trainer`, after its heavy imports.

    Args:
        workers: the settings that name the trainer.
        worker: the worker's number.
        threads: CPU threads of each of its processes.
        place: its devices and its log.
    """
    remember(place.references)
    # OpenMP threads that spin while they wait make a trial several times slower when anything else runs
    # on the same cores (benchmarks/wait_policy.py); read once, when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if workers.trainer == "fake":
        from sweeper.workers.fake_runner import FakeRunner

        return FakeRunner(workers.fake)
    devices = devices_of(worker, place.devices, place.survey)
    # before torch is imported: CUDA reads the variable once in a process
    see_devices(devices[0], devices[1:])
    from sweeper.modeling.lean_imports import lean_imports

    with uncollected(), lean_imports():
        from sweeper.modeling.hardware import prepare_device
        from sweeper.training.trial_runner import TransformersRunner
        from sweeper.workers.followers import FollowerGroup

    prepare_device(devices[0])
    return TransformersRunner(threads, FollowerGroup(devices, threads, place.log).join)


def _answer(command: JudgeCommand | ProbeCommand | CheckCommand, runner: TrialRunner) -> WorkAnswer:
    try:
        match command:
            case ProbeCommand():
                return _probed(command, runner)
            case CheckCommand():
                return _checked(command, runner)
            case JudgeCommand():
                return _judged(command, runner)
    except InputsChanged as error:
        return _changed(command, error)


def _changed(command: Work, error: InputsChanged) -> InputsChangedEvent:
    return InputsChangedEvent(job=command.job, attempt=command.attempt, message=str(error))


def _probed(command: ProbeCommand, runner: TrialRunner) -> ProbedEvent:
    facts: ArmBaseline | None = None
    message: str | None = None
    misfit: MemoryShortfall | None = None
    try:
        facts = runner.probe(command.settings, command.adopted)
    except SweeperError as error:
        message = str(error)
        misfit = error.misfit if isinstance(error, DoesNotFit) else None
    except Exception as error:  # noqa: BLE001 - the worker's edge: the driver shows it
        require_whole_context(error)
        message = _traceback()
    return ProbedEvent(
        job=command.job, attempt=command.attempt, facts=facts, message=message, misfit=misfit
    )


def _checked(command: CheckCommand, runner: TrialRunner) -> CheckedEvent:
    size: TrialSize | None = None
    refusal: Outcome | None = None
    try:
        size = runner.check(command.settings, command.expected)
    except InputsChanged:
        raise
    except SweeperError as error:
        refusal = Outcome(cause="refused", message=str(error))
    except Exception as error:  # noqa: BLE001 - the worker's edge: it must survive a trial
        require_whole_context(error)
        refusal = Outcome(cause="error", message=_traceback())
    return CheckedEvent(job=command.job, attempt=command.attempt, size=size, refusal=refusal)


def _judged(command: JudgeCommand, runner: TrialRunner) -> JudgedEvent:
    losses: HeldOutLosses | None = None
    message: str | None = None
    try:
        folder = None if command.folder is None else TrialFolder(command.folder)
        losses = runner.test(command.settings, folder, command.kinds, command.expected)
    except InputsChanged:
        raise
    except SweeperError as error:
        message = str(error)
    except Exception as error:  # noqa: BLE001 - the worker's edge: the driver shows it
        require_whole_context(error)
        message = _traceback()
    return JudgedEvent(job=command.job, attempt=command.attempt, losses=losses, message=message)


@dataclass
class DiskPatience:
    """Measures how long a worker has waited for a full disk, over all its trials."""

    waited_s: float = 0.0

    @property
    def exhausted(self) -> bool:
        """True if the next trial would wait in vain as well."""
        return self.waited_s > FULL_DISK_PATIENCE_S

    def wait(self) -> None:
        """Wait for a moment."""
        time.sleep(FULL_DISK_WAIT_S)
        self.waited_s += FULL_DISK_WAIT_S


def _outcome(
    command: SubmitCommand,
    runner: TrialRunner,
    channel: WorkerChannel,
    orders: CommandQueue,
    patience: DiskPatience,
) -> Outcome:
    """Run a trial. On a full disk, wait and continue from the newest whole checkpoint."""
    observer = RemoteObserver(channel, orders, command.job, command.attempt, command.watched)
    folder = TrialFolder(command.folder)
    announced = False
    while True:
        try:
            outcome = _run(command, runner, folder, observer)
        except InputsChanged:
            raise  # not the trial's fault: it continues in another run
        except Exception as error:  # the worker's edge: one trial must not end the worker
            require_whole_context(error)
            if isinstance(error, WorkerError):
                raise  # not the trial's fault: it continues on another worker
            if not disk_full(error, folder.path):
                return Outcome(cause="error", message=_traceback())
        else:
            # a trial that ended has found space, so the next full disk is a new one
            patience.waited_s = 0.0
            return outcome
        if not announced:
            message = f"the disk of {folder.path} is full. Waiting for space"
            channel.send(WaitingEvent(job=command.job, attempt=command.attempt, message=message))
            announced = True
        if patience.exhausted:
            return Outcome(cause="error", message=f"the disk stays full: {folder.path}")
        patience.wait()
        if (cause := observer.stop_cause()) is not None:
            return Outcome(cause=cause, message="stopped while the disk was full")


def _run(
    command: SubmitCommand, runner: TrialRunner, folder: TrialFolder, observer: RemoteObserver
) -> Outcome:
    if command.adopted is not None:
        return runner.judge_baseline(
            command.settings, folder, command.provenance, command.adopted, command.expected
        )
    return runner.run(command.settings, folder, command.provenance, observer, command.expected)


def disk_full(error: Exception, folder: Path) -> bool:
    """Return True if a trial failed on a full disk, for which libraries raise errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return shutil.disk_usage(folder if folder.exists() else folder.parent).free < FULL_BYTES


def _traceback() -> str:
    return redact("\n".join(traceback.format_exc().splitlines()[-TRACEBACK_LINES:]))
