"""Words about a silent job, and the end of the wait for it, with a clock that the test moves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from sweeper.core.signals import StopSignal
from sweeper.driver.arm_probe import ProbeJob
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import JudgeJob
from sweeper.driver.job_waits import JobWaits
from sweeper.driver.jobs import Job, JobList, JobPhase
from sweeper.driver.worker_pool import WorkerPool
from sweeper.workers.protocol import JudgedEvent, SlotsEvent, Work, WorkerEvent, WorkingEvent, lost
from tests.conftest import make_settings
from tests.driver.scripted import ScriptedEngine

RUN = make_settings("workers=local")
SLOT = SlotsEvent(worker=0, free=1)


class StoppableJob(JudgeJob):
    """A job that reports its steps, as a trial does."""

    stoppable = True


class Time:
    """A clock, the end of the study's time, and what was announced."""

    def __init__(self, end: float = math.inf) -> None:
        self.now = 0.0
        self.end = end
        self.said: list[str] = []
        self.waits = JobWaits(
            self.said.append, RUN.workers, lambda: self.now - self.end, lambda: self.now
        )

    def passes(self, seconds: int, *busy: Job, starting: bool = False) -> None:
        """Let so many turns of a second pass."""
        for _ in range(seconds):
            self.now += 1
            self.waits.turn(busy, starting)


def _probe() -> ProbeJob:
    return ProbeJob("lora", RUN.trial, phase=JobPhase.RUNNING)


def _judge(number: int = 0) -> JudgeJob:
    key = f"lora/{number:04d}_untuned"
    return JudgeJob(key, RUN.trial, None, ("test",), phase=JobPhase.RUNNING)


def test_a_long_wait_is_announced_and_repeated() -> None:
    """After ten seconds, then each minute: what a worker does, for how long, and the limit."""
    time, probe = Time(), _probe()
    time.passes(9, probe)
    assert time.said == []
    time.passes(65, probe)
    words = "lora probe: loading base and data for {} s (limit 4 h, workers.probe_timeout_s)"
    assert time.said == [words.format(10), words.format(70)]
    probe.attempt = 2
    time.passes(12, probe)
    assert time.said[2:] == [words.format(10)], "another attempt is another wait"


def test_a_workers_words_are_said_every_ten_seconds() -> None:
    """The stage first, then each count that is news, and no count twice."""
    time, probe = Time(), _probe()
    for rows in range(0, 4000, 100):
        time.waits.heard(probe, f"judging the untuned base: {rows:,} of 17,436 rows")
        time.passes(1, probe)
    time.passes(30, probe)
    assert time.said == [
        "lora probe: judging the untuned base for 10 s (limit 4 h, workers.probe_timeout_s)",
        "lora probe: judging the untuned base: 1,900 of 17,436 rows",
        "lora probe: judging the untuned base: 2,900 of 17,436 rows",
        "lora probe: judging the untuned base: 3,900 of 17,436 rows",
    ]


def test_a_slow_trial_is_said_every_half_minute() -> None:
    """In plain output only: a live table shows the steps."""
    trial = StoppableJob("lora/0003", RUN.trial, None, ("test",), phase=JobPhase.RUNNING)
    for shown, lines in ((True, 4), (False, 0)):
        time, said = Time(), []
        time.waits = JobWaits(
            time.said.append,
            clock=lambda time=time: time.now,
            announce_trial=said.append if shown else None,
        )
        for step in range(120):
            time.waits.heard(trial, f"step {step} of 200, loss 2.31")
            time.passes(1, trial)
        assert len(said) == lines
        assert said[:1] in ([], ["lora/0003: step 29 of 200, loss 2.31"])
        assert time.said == []
        assert time.waits.hanging([trial]) == [], "a trial has limits of its own"


def test_words_reach_the_person_through_the_dispatcher() -> None:
    """A WorkingEvent of the current attempt is passed on, and ends no job."""
    time = Time()

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        words = [WorkingEvent(job=work.job, attempt=1, message=f"judging: {n}") for n in range(30)]
        answer = JudgedEvent(job=work.job, attempt=1, losses=None, message=None)
        return (*words, answer, SLOT)

    engine = ScriptedEngine(script)
    listen = engine.next_event

    def next_event(timeout_s: float) -> WorkerEvent | None:
        time.now += 1
        return listen(timeout_s)

    engine.next_event = next_event  # type: ignore[method-assign]
    _run([_judge()], engine, time)
    assert "lora/0000_untuned: judging: 19" in time.said


def test_a_worker_that_takes_long_to_start_is_announced() -> None:
    """Once for each start, with its limit."""
    time = Time()
    time.passes(30, starting=True)
    time.passes(5, _judge())
    time.passes(30, starting=True)
    assert time.said == 2 * ["waiting for a worker to start for 10 s (limit 15 min)"]


def test_a_suspended_driver_has_waited_for_nothing() -> None:
    """An hour within one turn is no silence of a worker."""
    time, probe = Time(end=60), _probe()
    time.passes(3, probe)
    time.now += 3600
    time.passes(3, probe)
    assert time.said == []
    assert time.waits.hanging([probe]) == []


@pytest.mark.parametrize(("answered_s", "patience_s"), [(0, 60), (29, 60), (50, 100), (600, 1200)])
def test_after_the_end_an_answer_may_take_twice_the_longest(
    answered_s: int, patience_s: int
) -> None:
    """A minute at least: a judgement that begins after the end of the time has its time."""
    time, probe, judge = Time(end=700), _probe(), _judge()
    time.passes(answered_s, probe)
    time.waits.answered(probe)
    time.passes(700 - answered_s)
    time.passes(patience_s - 2, judge)
    assert time.waits.hanging([judge]) == []
    time.passes(2, judge)
    assert time.waits.hanging([judge]) == [judge]


def test_before_the_end_nothing_hangs() -> None:
    """The limits of the workers count there."""
    time, probe = Time(), _probe()
    time.passes(20_000, probe)
    time.passes(100, starting=True)
    assert time.waits.hanging([probe]) == []
    assert not time.waits.start_hangs


def _run(jobs: Sequence[Job], engine: ScriptedEngine, time: Time) -> None:
    pool = WorkerPool()
    pool.host_with(engine)
    Dispatcher(pool, StopSignal(), time.said.append, waits=time.waits).run(JobList(jobs))


class SilentEngine(ScriptedEngine):
    """An engine whose workers never answer: each listening takes a second."""

    def __init__(self, time: Time, workers: int = 1) -> None:
        super().__init__(lambda worker, work: (SlotsEvent(worker=worker, free=0),), workers)
        self._time = time
        self.killed: list[str] = []

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        self.killed.append(reason)
        self._events += [lost(worker, self.sent[-1], reason, reason), SLOT]

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        self._time.now += 1
        return super().next_event(timeout_s)


def test_hanging_jobs_are_ended_after_the_end_of_the_time() -> None:
    """Each on its own worker, which is killed, without another attempt."""
    time = Time(end=5)
    engine, jobs = SilentEngine(time), [_judge(0), _judge(1)]
    _run(jobs, engine, time)
    words = "not waited for any longer: the time is used up, and no answer for 60 s"
    assert engine.killed == [words, words]
    assert [work.attempt for work in engine.sent] == [1, 1]
    assert [job.phase for job in jobs] == [JobPhase.ENDED] * 2
    assert f"lora/0001_untuned: {words}" in time.said
    assert time.now < 200


def test_without_any_worker_the_run_ends_after_the_end_of_the_time() -> None:
    """Workers that hang in their start keep nobody waiting."""
    time = Time(end=5)
    _run([_probe()], SilentEngine(time, workers=0), time)
    assert time.said[-1] == "the time is used up, and no worker has started for 60 s"
    assert time.now < 100


def test_a_job_that_is_lost_after_the_end_gets_no_further_attempt() -> None:
    """The retry of a probe would load the base again for a search that starts nothing."""

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        time.now = 10
        return (lost(worker, work, None, "dead"), SLOT)

    time, probe = Time(end=5), _probe()
    engine = ScriptedEngine(script)
    _run([probe], engine, time)
    assert time.said == ["lora probe: dead", "lora probe: no further attempt: the time is used up"]
    assert (len(engine.sent), probe.lost, probe.answer) == (1, None, None)
