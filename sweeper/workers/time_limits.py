"""Limits on a trial's time, around any engine: a worker that exceeds one is killed.

Two limits. `trial_timeout_s`: how long one attempt may take. `stall_timeout_s`: how long a worker that
has a trial may say nothing. There is no heartbeat on purpose: a thread that beats beside a hung trial
would only prove that the thread is well; steps and evaluations are what a living trial sends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sweeper.config.settings import WorkerSettings
from sweeper.core.outcome import StopCause
from sweeper.workers.protocol import (
    CheckCommand,
    EndedEvent,
    Engine,
    EvaluatedEvent,
    JudgeCommand,
    LostEvent,
    ProbeCommand,
    ProgressEvent,
    SubmitCommand,
    WaitingEvent,
    WorkerEvent,
)


@dataclass
class AttemptClock:
    """The time of one attempt so far."""

    trial: str
    started: float
    silence_s: float = 0.0
    killed: bool = False


class LimitedEngine:
    """An engine whose trials have limits.

    Silence is counted only while the driver listens and nothing comes: a driver that was itself
    suspended, or kept waiting by its database, finds the messages first and kills nobody.
    """

    def __init__(
        self, engine: Engine, workers: WorkerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._trial_timeout_s = workers.trial_timeout_s
        self._stall_timeout_s = workers.stall_timeout_s
        self._clock = clock
        self._watches: dict[int, AttemptClock] = {}

    def probe(self, worker: int, probe: ProbeCommand | CheckCommand) -> None:
        """See Engine; loading a base has no limit (it may be a download)."""
        self._engine.probe(worker, probe)

    def submit(self, worker: int, submit: SubmitCommand) -> None:
        """See Engine."""
        self._watches[worker] = AttemptClock(submit.trial, self._clock())
        self._engine.submit(worker, submit)

    def test(self, worker: int, test: JudgeCommand) -> None:
        """See Engine; loading what is judged has no limit, as for a probe."""
        self._engine.test(worker, test)

    def stop(self, trial: str, cause: StopCause) -> None:
        """See Engine."""
        self._engine.stop(trial, cause)

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        self._engine.kill(worker, reason)

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        began = self._clock()
        event = self._engine.next_event(timeout_s)
        listened_s = min(self._clock() - began, timeout_s)  # more: this process was suspended
        for watch in self._watches.values():
            watch.silence_s += listened_s
        self._note(event)
        self._enforce()
        return event

    def close(self) -> None:
        """See Engine."""
        self._engine.close()

    def _note(self, event: WorkerEvent | None) -> None:
        match event:
            case ProgressEvent() | EvaluatedEvent():
                for watch in self._watches.values():
                    if watch.trial == event.trial:
                        watch.silence_s = 0.0
            case WaitingEvent():  # for a person; its worker has a patience of its own
                for watch in self._watches.values():
                    if watch.trial == event.trial:
                        watch.silence_s = -math.inf
            case EndedEvent():
                kept = self._watches.items()
                self._watches = {key: value for key, value in kept if value.trial != event.trial}
            case LostEvent():
                self._watches.pop(event.worker, None)

    def _enforce(self) -> None:
        for worker, watch in self._watches.items():
            reason = self._exceeded(watch)
            if reason is not None and not watch.killed:
                watch.killed = True
                self._engine.kill(worker, reason)

    def _exceeded(self, watch: AttemptClock) -> str | None:
        if self._stall_timeout_s is not None and watch.silence_s >= self._stall_timeout_s:
            return (
                f"killed: no step and no evaluation for {self._stall_timeout_s:g} s "
                "(workers.stall_timeout_s)"
            )
        took = self._clock() - watch.started
        if self._trial_timeout_s is not None and took >= self._trial_timeout_s:
            return (
                f"killed: this attempt takes more than {self._trial_timeout_s:g} s "
                "(workers.trial_timeout_s)"
            )
        return None
