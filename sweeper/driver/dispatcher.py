"""The dispatcher: the one loop that hands jobs to workers and listens to them.

Whatever the kind of job, the dispatcher hands it to a free slot, passes events on, gives a job whose
worker died another attempt, and stops, pauses and cancels it. Between two turns a supervisor obeys
commands, and an interrupt is looked at. There is no batch barrier: the moment a slot is free the source
is asked for the next job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn, Protocol

from sweeper.core.errors import CommandRefused, InputsChanged, StudyError
from sweeper.core.signals import StopSignal
from sweeper.driver.job_waits import JobWaits, is_silent
from sweeper.driver.jobs import MAX_ATTEMPTS, Job, JobList, JobPhase, JobSource, LostCause
from sweeper.driver.pause_clock import PAUSE_PATIENCE_SECONDS, PauseClock
from sweeper.driver.worker_pool import WorkerPool
from sweeper.workers.protocol import (
    EndedEvent,
    EvaluatedEvent,
    InputsChangedEvent,
    LostEvent,
    SlotsEvent,
    WaitingEvent,
    WorkAnswer,
    WorkerEvent,
    WorkingEvent,
)
from sweeper.workers.time_limits import SLOW_START

# the longest that a command or a signal waits for the loop while no event comes
POLL_SECONDS = 1.0
CANCEL_SECONDS = 10.0
"""Silence after which cancelled jobs are no longer waited for. A judgement: a stop and its
checkpoint take seconds, and a run is to end within 30 s (docs/reliability.md, R5)."""

DispatchMode = Literal["running", "paused", "stopping"]


class Supervisor(Protocol):
    """Looks after a run between two turns of the loop."""

    def on_turn(self, dispatcher: Dispatcher, source: JobSource[Any]) -> None:
        """Obey commands and report the state of the run."""


class Unsupervised:
    """A supervisor of runs that take no commands."""

    def on_turn(self, dispatcher: Dispatcher, source: JobSource[Any]) -> None:
        """See Supervisor."""


class JobTable:
    """The open jobs of a run: those that occupy a worker, by key, and those that wait for one."""

    def __init__(self) -> None:
        self.running: dict[str, Job] = {}
        self.queue: deque[Job] = deque()

    def __bool__(self) -> bool:
        return bool(self.running or self.queue)

    def all(self) -> list[Job]:
        """Return every open job, those that are only checked after those that run."""
        running = sorted(self.running.values(), key=lambda job: job.phase is JobPhase.CHECKING)
        return [*running, *self.queue]

    def on(self, worker: int) -> list[Job]:
        """Return the jobs that a worker runs."""
        return [job for job in self.running.values() if job.worker == worker]

    def any_runs(self, jobs: Sequence[Job]) -> bool:
        """Return True if one of these jobs still occupies a worker."""
        return any(job.key in self.running for job in jobs)

    def requeue(self, job: Job, *, first: bool = False) -> None:
        """Put a job back into the queue."""
        self.running.pop(job.key, None)
        job.phase = JobPhase.QUEUED
        (self.queue.appendleft if first else self.queue.append)(job)

    def remove(self, job: Job) -> None:
        """Forget a job."""
        self.running.pop(job.key, None)
        if job in self.queue:
            self.queue.remove(job)


class Dispatcher:
    """Runs the jobs of one source after the other on one pool of workers."""

    def __init__(
        self,
        pool: WorkerPool,
        interrupt: StopSignal,
        announce: Callable[[str], None],
        supervisor: Supervisor | None = None,
        pause_clock: PauseClock | None = None,
        waits: JobWaits | None = None,
    ) -> None:
        """
        Args:
            pool: the workers.
            interrupt: checked once a turn.
            announce: takes a sentence for the person who follows the run.
            supervisor: called once a turn. A run without one takes no commands.
            pause_clock: measures pauses.
            waits: measures how long jobs report nothing. Without it no end of the study's time is known.
        """
        self.mode: DispatchMode = "running"
        self._pool = pool
        self._interrupt = interrupt
        self._announce = announce
        self._supervisor = supervisor or Unsupervised()
        self._pause_clock = pause_clock or PauseClock()
        self._waits = waits or JobWaits(announce)
        self._jobs = JobTable()
        self._source: JobSource[Any] = JobList[Job](())
        self._unsettled = False
        """True if a job has ended since the source was last asked."""

    @property
    def busy(self) -> list[Job]:
        """The jobs that occupy a worker."""
        return list(self._jobs.running.values())

    @property
    def ends_now(self) -> bool:
        """True if the run ends before its next turn, which nothing can cancel."""
        return self._interrupt.number is not None

    def run(self, source: JobSource[Any]) -> None:
        """Run all jobs of a source to their ends.

        Args:
            source: asked for a job whenever a slot is free.

        Raises:
            StudyError: the source cannot continue.
            InputsChanged: a worker found other data or another base model than its job expects.
            KeyboardInterrupt: a person or a signal stopped the run.
            WorkerError: workers cannot start.
            All open jobs were cancelled before the first three are raised.
        """
        self._source = source
        try:
            # before the first job: commands that were kept may raise the total or come first
            self._attend()
            while True:
                self._interrupt.check()
                self._hand_out()
                # a paused run without any job still waits for its resume
                if self.mode == "running" and not self._jobs and source.done:
                    return
                if (event := self._listen()) is not None:
                    self._route(event)
                self._attend()
                if not self._is_worth_waiting():
                    return
        except (KeyboardInterrupt, StudyError):
            self._cancel()
            raise

    def pause(self) -> None:
        """Stop all running jobs, to be continued after `resume`, and start none until then."""
        self.mode = "paused"
        self._pause_clock.begin()
        for job in self._jobs.running.values():
            # a check or a probe cannot be stopped: it ends soon, or its worker is ended with the pause
            if job.phase is JobPhase.RUNNING and job.stoppable:
                self._pool.engine.stop(job.key, "cancelled")
                job.phase = JobPhase.PAUSING

    def resume(self) -> None:
        """Start jobs again, after a pause or a stop."""
        if self.mode == "paused":
            self._pause_clock.count()
        self.mode = "running"

    def stop(self, *, now: bool) -> None:
        """Start no further job and end the run after the running ones, or at once with `now`."""
        self.mode = "stopping"
        if now:
            self._interrupt.request()

    def drop(self, key: str) -> None:
        """Stop one job for good.

        Raises:
            CommandRefused: there is no such job, or it is of a kind that cannot be dropped.
        """
        jobs = {job.key: job for job in self._jobs.all() if job.stoppable}
        # A trial of an earlier run may wait in its search until a worker has started
        if key not in jobs and (waiting := self._source.withdraw(key)) is not None:
            jobs[key] = waiting
        if key not in jobs:
            raise CommandRefused(f"{key} is not running. Running now: {', '.join(jobs) or 'none'}")
        job = jobs[key]
        job.drop()
        phase, job.phase = job.phase, JobPhase.DROPPING
        # a check cannot be stopped, and nobody waits for its answer any more
        if phase in (JobPhase.QUEUED, JobPhase.CHECKING):
            job.cancel()
            self._end(job)
        elif phase is JobPhase.RUNNING:
            self._pool.engine.stop(key, "cancelled")

    def _attend(self) -> None:
        """Let the supervisor act, then keep a pause or a stop."""
        self._supervisor.on_turn(self, self._source)
        busy = self.busy
        if self.mode == "stopping" and not busy:
            # ends with the exit code of Ctrl-C: a study that was stopped has not reached its total
            self._interrupt.request()
        if self.mode != "paused":
            return
        self._pause_clock.count()
        if not busy and not self._pause_clock.workers_ended:
            # an idle worker keeps the base model in the memory of its device
            self._pool.kill_all("paused")
            self._pause_clock.workers_ended = True
            seconds = self._pause_clock.seconds
            self._announce(
                f"paused after {seconds:.0f} s: all workers ended, their devices are free"
            )
        elif busy and self._pause_clock.patience_is_over():
            for job in busy:
                seconds = PAUSE_PATIENCE_SECONDS
                self._announce(
                    f"{job.key} has not stopped within {seconds:.0f} s: ending its worker"
                )
                if job.phase is not JobPhase.DROPPING:
                    job.phase = JobPhase.PAUSING  # its loss costs no attempt
                self._pool.kill(job.worker, "paused, and took too long to stop")

    def _is_worth_waiting(self) -> bool:
        """End jobs that hang after the end of the study's time. Return False if workers hang too."""
        # a pause has a patience of its own (PauseClock)
        if self.mode == "paused":
            return True
        idle = not self.busy and not self._pool.free_workers()
        self._waits.turn(self.busy, idle)
        seconds = self._waits.patience_s
        for job in self._waits.hanging(self.busy):
            words = (
                f"not waited for any longer: the time is used up, and no answer for {seconds:.0f} s"
            )
            self._announce(f"{job.key}: {words}")
            self._pool.kill(job.worker, words)
            self._give_up(job)
        if self._waits.start_hangs:
            self._announce(f"the time is used up, and no worker has started for {seconds:.0f} s")
            for job in self._jobs.all():
                self._give_up(job)
            self._source.abandon()
            return False
        return True

    def _give_up(self, job: Job) -> None:
        job.cancel()
        self._end(job)

    def _hand_out(self) -> None:
        if self.mode != "running":
            return
        queue, free = self._jobs.queue, self._pool.free_workers()
        # The end of an arm needs no worker: the last one may have died, and others may be busy for long
        if self._unsettled and not free:
            self._source.settle()
        self._unsettled = False
        for worker in free:
            job: Job | None = queue.popleft() if queue else self._source.next_job()
            if job is None:
                return
            self._pool.occupy(worker)
            job.worker = worker
            self._jobs.running[job.key] = job
            job.phase = job.send(self._pool.engine, worker)

    def _listen(self) -> WorkerEvent | None:
        event = self._pool.engine.next_event(POLL_SECONDS)
        if event is not None:
            # before the event is routed: a job that is lost or ends must find its slot gone or free
            self._pool.note(event)
        return event

    def _route(self, event: WorkerEvent) -> None:
        """Pass an event on to the job that it concerns."""
        if isinstance(event, LostEvent):
            # by worker: an engine may no longer know which job a dead worker ran
            for lost in self._jobs.on(event.worker):
                self._lost(lost, event)
            if event.message.startswith(SLOW_START):
                self._announce(f"worker {event.worker}: {event.message}")
        elif not isinstance(event, SlotsEvent):
            job = self._jobs.running.get(event.job)
            if job is None or job.attempt != event.attempt:
                return  # sent before the job was lost or ended
            if isinstance(event, WorkingEvent):
                self._waits.heard(job, event.message)
            elif isinstance(event, WaitingEvent):
                self._announce(f"{job.key}: {event.message}")
            elif isinstance(event, InputsChangedEvent):
                self._refuse_inputs(job, event)
            else:
                self._advance(job, event)

    def _advance(self, job: Job, event: WorkerEvent) -> None:
        stopped = isinstance(event, EndedEvent) and event.outcome.cause == "cancelled"
        # a job that came to another end while it was asked to pause has its result
        if stopped and job.phase is JobPhase.PAUSING:
            self._jobs.requeue(job)
            job.on_requeued(paused=True)
            return
        if isinstance(event, WorkAnswer) and is_silent(job):
            self._waits.answered(job)
        match job.on_event(event):
            case None if job.watched and isinstance(event, EvaluatedEvent):
                # also if it was asked to stop: it does so once its evaluation is decided
                self._pool.engine.proceed(job.key, event.step)
            case JobPhase.ENDED:
                self._end(job)
            case JobPhase.QUEUED:
                # it was taken from the source before everything else that waits
                self._jobs.requeue(job, first=True)
            case JobPhase.PRUNING:
                job.phase = JobPhase.PRUNING
                self._pool.engine.stop(job.key, "pruned")

    def _refuse_inputs(self, job: Job, event: InputsChangedEvent) -> NoReturn:
        """End the run, and leave the job open, so that the next run continues it."""
        if job.phase is JobPhase.DROPPING:
            job.cancel()
            self._end(job)
        else:
            self._jobs.requeue(job, first=True)
        raise InputsChanged(f"{job.key} found other data or another base model:\n{event.message}")

    def _lost(self, job: Job, event: LostEvent) -> None:
        """Give a job whose worker died another attempt, or end it."""
        first_line, _, _ = event.message.partition("\n")
        self._announce(f"{job.key}: {first_line}")
        if job.phase is JobPhase.DROPPING:
            job.cancel()
            self._end(job)
        elif job.phase is JobPhase.PAUSING and event.cause == "timeout":
            # ended on purpose, which costs no attempt
            self._jobs.requeue(job)
            job.on_requeued(paused=True)
        elif (result := _result_of(job, event)) is not None:
            job.fail(result, event.message)
            self._end(job)
        elif self._waits.time_is_over and (is_silent(job) or event.cause == "timeout"):
            # a trial that was killed for a limit is cancelled, so that the next run continues it
            self._announce(f"{job.key}: no further attempt: the time is used up")
            self._give_up(job)
        else:
            job.attempt += 1
            job.broken_devices += event.cause == "device"
            self._jobs.requeue(job)
            job.on_requeued(paused=False)

    def _end(self, job: Job) -> None:
        self._jobs.remove(job)
        # before the phase changes, from which a source reads that a person dropped the job
        self._source.finished(job)
        job.phase = JobPhase.ENDED
        self._unsettled = True

    def _cancel(self) -> None:
        """Stop what runs, wait a moment for it, and cancel whatever is still open then."""
        stopping = [
            job for job in self.busy if job.stoppable and job.phase is not JobPhase.CHECKING
        ]
        # other jobs do not react to a stop: they end with their workers
        for job in stopping:
            if job.phase is not JobPhase.PRUNING:  # else it ends as hopeless
                self._pool.engine.stop(job.key, "cancelled")
        silent_s = 0.0
        while self._jobs.any_runs(stopping) and silent_s < CANCEL_SECONDS:
            event = self._listen()
            # only silence counts: a trial that still writes its checkpoint may take longer
            silent_s += POLL_SECONDS if event is None else 0.0
            if isinstance(event, EvaluatedEvent | EndedEvent | LostEvent | InputsChangedEvent):
                with suppress(StudyError):  # the run ends already
                    self._route(event)
        for job in self._jobs.all():
            job.cancel()
            self._end(job)
        self._source.abandon()


def _result_of(job: Job, event: LostEvent) -> LostCause | None:
    """Return how a job ends whose worker died, or None if it gets another attempt."""
    if event.cause == "device":
        # A GPU's context may break by another process or by the hardware, but hardly twice in one job
        return "error" if job.broken_devices or job.attempt >= MAX_ATTEMPTS else None
    # After out of memory no attempt: the job would run out of memory again
    return event.cause if event.cause == "oom" or job.attempt >= MAX_ATTEMPTS else None
