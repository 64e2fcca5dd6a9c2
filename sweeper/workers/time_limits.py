"""Time limits around any engine: a worker that exceeds one is killed.

Four limits. `START_SECONDS`: how long a worker may take until its first slot. `trial_timeout_s`: how
long one attempt of a trial may take. `stall_timeout_s`: how long a worker that trains may report
nothing. `probe_timeout_s`: how long a worker may take to answer a probe, a check or a judgement, which
report no progress. There is no heartbeat on purpose: a thread that beats next to a hung trial would only
prove that the thread is well. Steps and evaluations are what a living trial sends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sweeper.config.settings import WorkerSettings
from sweeper.core.errors import WorkerError
from sweeper.core.outcome import StopCause
from sweeper.workers.protocol import (
    Engine,
    EvaluatedEvent,
    LostEvent,
    ProgressEvent,
    SlotsEvent,
    SubmitCommand,
    WaitingEvent,
    Work,
    WorkAnswer,
    WorkerEvent,
)

START_SECONDS = 900.0
"""Time limit of a worker to import its libraries, which a busy network disk can make slow."""
MAX_SLOW_STARTS = 3
"""Workers in a row that may pass START_SECONDS. As with the attempts of a job, a third one is no
chance."""
SLOW_START = "killed: not ready"


def start_limit_s(workers: WorkerSettings) -> float | None:
    """Return the time limit of a worker's start, or None if answers have none either.

    Ray has a limit of its own: a worker may have to wait for a node.
    """
    limit_s = workers.probe_timeout_s
    return None if limit_s is None or workers.engine == "ray" else min(START_SECONDS, limit_s)


@dataclass
class AttemptClock:
    """The time that one attempt of a job has taken so far, and its limits in seconds."""

    job: str
    trains: bool
    started: float
    total_limit_s: float | None
    silence_limit_s: float | None
    silence_s: float = 0.0

    def exceeded(self, now: float) -> str | None:
        """Return why the attempt must end, or None while it is within its limits."""
        limit_s = self.silence_limit_s
        if limit_s is not None and self.silence_s >= limit_s:
            if self.trains:
                return (
                    f"killed: no step and no evaluation for {limit_s:g} s (workers.stall_timeout_s)"
                )
            return f"killed: no answer for {limit_s:g} s (workers.probe_timeout_s)"
        limit_s = self.total_limit_s
        if limit_s is not None and now - self.started >= limit_s:
            return f"killed: this attempt takes more than {limit_s:g} s (workers.trial_timeout_s)"
        return None


class LimitedEngine:
    """An engine whose jobs have time limits.

    Silence is counted only while the driver listens and nothing comes. A driver that was itself
    suspended, or kept waiting by its database, first finds the messages and kills no worker.
    """

    def __init__(
        self,
        engine: Engine,
        workers: WorkerSettings,
        clock: Callable[[], float] = time.monotonic,
        count: int = 0,
    ) -> None:
        """
        Args:
            engine: hosts the workers.
            workers: holds the limits.
            clock: a steady clock in seconds.
            count: number of workers that the engine has started.
        """
        self._engine = engine
        self._limits = workers
        self._clock = clock
        self._clocks: dict[int, AttemptClock] = {}
        self._killed: set[int] = set()
        """Workers whose loss has not arrived."""
        self._starting = dict.fromkeys(range(count), 0.0)
        """Seconds of waiting for each worker that has not announced a slot yet."""
        self._slow_starts = 0

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        trains, limits = isinstance(work, SubmitCommand), self._limits
        # loading a base may be a download, so an answer has a limit of its own
        self._clocks[worker] = AttemptClock(
            job=work.job,
            trains=trains,
            started=self._clock(),
            total_limit_s=limits.trial_timeout_s if trains else None,
            silence_limit_s=limits.stall_timeout_s if trains else limits.probe_timeout_s,
        )
        self._engine.send(worker, work)

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""
        self._engine.stop(job, cause)

    def proceed(self, job: str, step: int) -> None:
        """See Engine."""
        self._engine.proceed(job, step)

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        if worker not in self._killed:  # its LostEvent may take a while
            self._killed.add(worker)
            self._engine.kill(worker, reason)

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        began = self._clock()
        event = self._engine.next_event(timeout_s)
        # a longer call means that this process was suspended, not that the workers were silent
        listened_s = min(self._clock() - began, timeout_s)
        for clock in self._clocks.values():
            clock.silence_s += listened_s
        for worker in self._starting:
            self._starting[worker] += listened_s
        if isinstance(event, SlotsEvent) and event.worker in self._killed:
            event = SlotsEvent(worker=event.worker, free=0)
        self._note(event)
        self._enforce()
        return event

    def close(self) -> None:
        """See Engine."""
        self._engine.close()

    def _note(self, event: WorkerEvent | None) -> None:
        match event:
            case ProgressEvent() | EvaluatedEvent():
                self._set_silence(event.job, 0.0)
            case WaitingEvent():  # a full disk: the worker has a patience of its own
                self._set_silence(event.job, -math.inf)
            case SlotsEvent():
                self._starting.pop(event.worker, None)
                self._slow_starts = 0
            case LostEvent():
                self._clocks.pop(event.worker, None)
                self._killed.discard(event.worker)
                # the engine has started a successor
                self._starting[event.worker] = 0.0
                self._count_start(event)
        if isinstance(event, WorkAnswer):
            kept = self._clocks.items()
            self._clocks = {worker: clock for worker, clock in kept if clock.job != event.job}

    def _count_start(self, event: LostEvent) -> None:
        """Count a worker that was killed in its start.

        Raises:
            WorkerError: MAX_SLOW_STARTS workers in a row were.
        """
        self._slow_starts += event.message.startswith(SLOW_START)
        if self._slow_starts >= MAX_SLOW_STARTS:
            raise WorkerError(f"worker {event.worker} never starts: {event.message}")

    def _set_silence(self, job: str, silence_s: float) -> None:
        for clock in self._clocks.values():
            if clock.job == job:
                clock.silence_s = silence_s

    def _enforce(self) -> None:
        now, limit_s = self._clock(), start_limit_s(self._limits)
        for worker, seconds in self._starting.items():
            if limit_s is not None and seconds >= limit_s:
                self.kill(worker, f"{SLOW_START} within {limit_s:g} s of its start")
        for worker, clock in self._clocks.items():
            reason = clock.exceeded(now)
            if reason is not None:
                self.kill(worker, reason)
