"""Time limits around any engine: a worker that exceeds one is killed.

Three limits. `trial_timeout_s`: how long one attempt of a trial may take. `stall_timeout_s`: how long a
worker that trains may report nothing. `probe_timeout_s`: how long a worker may take to answer a probe, a
check or a judgement, which report no progress. There is no heartbeat on purpose: a thread that beats
next to a hung trial would only prove that the thread is well. Steps and evaluations are what a living
trial sends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sweeper.config.settings import WorkerSettings
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
        self, engine: Engine, workers: WorkerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._limits = workers
        self._clock = clock
        self._clocks: dict[int, AttemptClock] = {}
        self._killed: set[int] = set()
        """Workers whose loss has not arrived."""

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
            case LostEvent():
                self._clocks.pop(event.worker, None)
                self._killed.discard(event.worker)
        if isinstance(event, WorkAnswer):
            kept = self._clocks.items()
            self._clocks = {worker: clock for worker, clock in kept if clock.job != event.job}

    def _set_silence(self, job: str, silence_s: float) -> None:
        for clock in self._clocks.values():
            if clock.job == job:
                clock.silence_s = silence_s

    def _enforce(self) -> None:
        now = self._clock()
        for worker, clock in self._clocks.items():
            reason = clock.exceeded(now)
            if reason is not None:
                self.kill(worker, reason)
