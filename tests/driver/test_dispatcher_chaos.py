"""The dispatcher under random crashes, kills, pauses, drops and stops: no job is lost or run twice."""

from __future__ import annotations

import io
import random
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from sweeper.core.errors import CommandRefused
from sweeper.core.outcome import HeldOutLosses, Outcome, StopCause, TrialSize
from sweeper.core.paths import TrialFolder
from sweeper.core.signals import StopSignal
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import JudgeJob
from sweeper.driver.jobs import MAX_ATTEMPTS, Job, JobList, JobPhase, JobSource
from sweeper.driver.pause_clock import PauseClock
from sweeper.driver.single_trial import SingleTrial
from sweeper.driver.worker_pool import WorkerPool
from sweeper.tracking.tracker import NullTracker, TrialRecord
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    EvaluatedEvent,
    JudgeCommand,
    JudgedEvent,
    LostEvent,
    SlotsEvent,
    SubmitCommand,
    Work,
    WorkAnswer,
    WorkerEvent,
    lost,
)
from sweeper.workers.time_limits import LimitedEngine
from tests.conftest import make_settings

SETTINGS = make_settings("workers=fake")
SIZE = TrialSize(trainable=1, total=2, rank=None, held_mib=1.0)
JOBS = 6


class ChaosEngine:
    """Workers that answer, crash and obey stops at random, and whose events wait to be read."""

    def __init__(self, chance: random.Random, workers: int) -> None:
        self._chance = chance
        slots = [SlotsEvent(worker=worker, free=1) for worker in range(workers)]
        self._sent: list[deque[WorkerEvent]] = [deque([slot]) for slot in slots]
        self._current: dict[int, Work] = {}
        self._stops: dict[str, StopCause] = {}
        self.crashes: Counter[str] = Counter()
        self.now = 0.0

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        assert not self._is_dead(worker), "work for a dead worker"
        assert worker not in self._current, "two jobs at once"
        assert work.job not in {other.job for other in self._current.values()}, "a job runs twice"
        self._current[worker] = work
        self._stops.pop(work.job, None)

    def proceed(self, job: str, step: int) -> None:
        """See Engine."""

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""
        for work in self._current.values():
            if work.job == job:
                assert isinstance(work, SubmitCommand), "only a training obeys a stop"
                self._stops[job] = cause

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        if not self._is_dead(worker):
            self._die(worker, reason)

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        self.now += 8 * self._chance.random()
        for worker, work in list(self._current.items()):
            if self._chance.random() < 0.6:
                self._work(worker, work)
        ready = [events for events in self._sent if events]
        heard = ready and self._chance.random() < 0.8
        return self._chance.choice(ready).popleft() if heard else None

    def close(self) -> None:
        """See Engine."""

    def _work(self, worker: int, work: Work) -> None:
        job, attempt, luck = work.job, work.attempt, self._chance.random()
        answer: WorkAnswer | None = None
        if luck < 0.06:
            self.crashes[job] += 1
            self._die(worker, None)
        elif isinstance(work, CheckCommand) and luck < 0.4:
            answer = CheckedEvent(job=job, attempt=attempt, size=SIZE, refusal=None)
        elif isinstance(work, JudgeCommand) and luck < 0.3:
            answer = JudgedEvent(job=job, attempt=attempt, losses=HeldOutLosses(), message=None)
        elif isinstance(work, SubmitCommand):
            cause: Literal["finished"] | StopCause = self._stops.get(job, "finished")
            if luck < (0.6 if job in self._stops else 0.2):
                answer = EndedEvent(job=job, attempt=attempt, outcome=Outcome(cause=cause))
            elif luck < 0.8:
                self._sent[worker].append(
                    EvaluatedEvent(job=job, attempt=attempt, step=1, total_steps=2, value=1.0)
                )
        if answer is not None:
            del self._current[worker]
            self._sent[worker].extend((answer, SlotsEvent(worker=worker, free=1)))

    def _die(self, worker: int, killed_for: str | None) -> None:
        gone = lost(worker, self._current.pop(worker, None), killed_for, "died")
        self._sent[worker].extend((gone, SlotsEvent(worker=worker, free=1)))

    def _is_dead(self, worker: int) -> bool:
        return any(isinstance(event, LostEvent) for event in self._sent[worker])


class ChaosTrial(SingleTrial):
    """A trial that a pruner stops at random, and that may be dropped."""

    chance = random.Random(0)
    dropped = False

    def drop(self) -> None:
        """See Job."""
        self.dropped = True

    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """See Job."""
        if isinstance(event, EvaluatedEvent):
            hopeless = self.phase is JobPhase.RUNNING and self.chance.random() < 0.3
            return JobPhase.PRUNING if hopeless else None
        return super().on_event(event)


class ChaosPerson:
    """Somebody who pauses, resumes, drops and stops at random."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._stops = chance.random() < 0.4
        self._turns = 0

    def on_turn(self, dispatcher: Dispatcher, source: JobSource[Any]) -> None:
        """See Supervisor."""
        self._turns += 1
        assert self._turns < 3000, "the run does not end"
        assert not {JobPhase.QUEUED, JobPhase.ENDED} & {job.phase for job in dispatcher.busy}
        luck, chance = self._chance.random(), self._chance
        if dispatcher.mode == "running" and luck < 0.1:
            dispatcher.pause()
        elif dispatcher.mode == "paused" and luck < 0.15:
            dispatcher.resume()
        if chance.random() < 0.03:
            with suppress(CommandRefused):
                dispatcher.drop(f"lora/{chance.randrange(JOBS)}")
        if self._stops and chance.random() < 0.01:
            dispatcher.stop(now=chance.random() < 0.5)


def _job(number: int, chance: random.Random) -> Job:
    key = f"lora/{number}"
    if chance.random() < 0.3:
        return JudgeJob(key, SETTINGS.trial, None, ("test",))
    record = TrialRecord(key, TrialFolder(Path("unused")), {})
    trial = ChaosTrial(record, SETTINGS.trial, NullTracker(), Console(file=io.StringIO()))
    trial.chance = chance
    return trial


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_every_job_ends_once_whatever_happens(first: int) -> None:
    """A hundred runs of six jobs: attempts count crashes alone, and only drops and stops cancel."""
    finished = 0
    for seed in range(first, first + 100):
        chance = random.Random(seed)
        engine, pool = ChaosEngine(chance, chance.choice([1, 2, 3])), WorkerPool()
        pool.host_with(LimitedEngine(engine, SETTINGS.workers, clock=lambda e=engine: e.now))  # type: ignore[misc]
        jobs, ended, stopped = [_job(number, chance) for number in range(JOBS)], list[Job](), False
        clock = PauseClock(clock=lambda e=engine: e.now)  # type: ignore[misc]
        dispatcher = Dispatcher(pool, StopSignal(), list[str]().append, ChaosPerson(chance), clock)
        try:
            dispatcher.run(JobList(jobs, ended.append))
        except KeyboardInterrupt:
            stopped = True
        assert len(ended) == len({job.key for job in ended}), seed
        assert stopped or len(ended) == JOBS, seed
        for job in ended:
            _check(job, engine.crashes[job.key], stopped, f"seed {seed}: {job.key}")
        finished += len(ended)
    assert finished > 50 * JOBS


def _check(job: Job, crashes: int, stopped: bool, where: str) -> None:
    assert job.attempt <= 1 + crashes, where
    assert crashes <= MAX_ATTEMPTS, where
    failed = crashes == MAX_ATTEMPTS
    if isinstance(job, JudgeJob):
        assert job.losses is not None or failed or stopped, where
    else:
        assert isinstance(job, ChaosTrial)
        assert job.outcome is not None, where
        assert failed or job.outcome.cause != "crash", where
        assert job.outcome.cause != "cancelled" or job.dropped or stopped, where
