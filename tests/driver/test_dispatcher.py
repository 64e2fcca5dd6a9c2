"""The dispatcher's promises for every kind of job, without a study and mostly without workers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from sweeper.core.device_failures import DeathCause
from sweeper.core.errors import InputsChanged, StudyError
from sweeper.core.outcome import HeldOutLosses, Outcome, StopCause, TrialSize
from sweeper.core.paths import TrialFolder
from sweeper.core.signals import StopSignal
from sweeper.driver.arm_probe import ProbeJob
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import JudgeJob
from sweeper.driver.jobs import MAX_ATTEMPTS, Job, JobList, JobPhase, JobSource
from sweeper.driver.single_trial import SingleTrial
from sweeper.driver.worker_pool import WorkerPool
from sweeper.tracking.tracker import NullTracker, TrialRecord
from sweeper.workers.engines import open_engine
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    Engine,
    InputsChangedEvent,
    JudgeCommand,
    JudgedEvent,
    LostEvent,
    ProbeCommand,
    ProbedEvent,
    SlotsEvent,
    SubmitCommand,
    Work,
    WorkerEvent,
    lost,
)
from sweeper.workers.time_limits import LimitedEngine
from tests.conftest import make_settings
from tests.driver.scripted import ScriptedEngine

SETTINGS = make_settings("workers=fake").trial
SLOT = SlotsEvent(worker=0, free=1)
MakeJob = Callable[[Path], Job]


def _trial(folder: Path) -> SingleTrial:
    record = TrialRecord("single/trial", TrialFolder(folder / "trial"), {})
    return SingleTrial(record, SETTINGS, NullTracker(), Console(file=io.StringIO()))


def _probe(folder: Path) -> ProbeJob:
    return ProbeJob("lora", SETTINGS)


def _judge(folder: Path) -> JudgeJob:
    return JudgeJob("lora/0000_untuned", SETTINGS, None, ("test",))


JOBS = [
    pytest.param(_probe, id="probe"),
    pytest.param(_trial, id="check"),
    pytest.param(_judge, id="judge"),
]


def _dispatcher(engine: Engine, words: list[str] | None = None) -> Dispatcher:
    pool = WorkerPool()
    pool.host_with(engine)
    return Dispatcher(pool, StopSignal(), ([] if words is None else words).append)


def _problem(job: Job) -> str | None:
    if isinstance(job, SingleTrial):
        assert job.outcome is not None
        return job.outcome.message
    if isinstance(job, ProbeJob):
        assert job.lost is not None
        return job.lost.message
    assert isinstance(job, JudgeJob)
    return job.problem


def _answer(work: Work) -> WorkerEvent:
    """Answer work as a worker does that finds nothing wrong."""
    job, attempt = work.job, work.attempt
    match work:
        case ProbeCommand():
            return ProbedEvent(job=job, attempt=attempt, facts=None, message="none")
        case CheckCommand():
            size = TrialSize(trainable=1, total=2, rank=None, held_mib=1.0)
            return CheckedEvent(job=job, attempt=attempt, size=size, refusal=None)
        case JudgeCommand():
            return JudgedEvent(job=job, attempt=attempt, losses=HeldOutLosses(), message=None)
        case SubmitCommand():
            return EndedEvent(job=job, attempt=attempt, outcome=Outcome(cause="finished"))


@pytest.mark.parametrize("make_job", JOBS)
def test_a_request_whose_worker_dies_is_sent_again(make_job: MakeJob, tmp_path: Path) -> None:
    """Its worker dies once during a probe, a check or a judgement: the second attempt is answered."""

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        if work.attempt == 1:
            return (lost(worker, work, None, "worker 0 ended with exit code 9"), SLOT)
        return (_answer(work), SLOT)

    job, words = make_job(tmp_path), list[str]()
    _dispatcher(ScriptedEngine(script), words).run(JobList([job]))
    assert (job.phase, job.attempt) == (JobPhase.ENDED, 2)
    assert words == [f"{job.key}: worker 0 ended with exit code 9"]


@pytest.mark.parametrize("make_job", JOBS)
def test_a_loss_that_names_no_job_ends_the_attempt(make_job: MakeJob, tmp_path: Path) -> None:
    """The worker is what is lost: whatever it ran is sent again, also if the engine does not know it."""

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        if work.attempt == 1:
            return (lost(worker, None, "killed", ""), SLOT)
        return (_answer(work), SLOT)

    job = make_job(tmp_path)
    _dispatcher(ScriptedEngine(script)).run(JobList([job]))
    assert (job.phase, job.attempt) == (JobPhase.ENDED, 2)


@pytest.mark.parametrize("make_job", JOBS)
def test_a_request_that_always_kills_its_worker_fails_after_three(
    make_job: MakeJob, tmp_path: Path
) -> None:
    """Three attempts, then the worker's last words are the job's result."""
    engine = ScriptedEngine(lambda worker, work: (lost(worker, work, None, "dead"), SLOT))
    job = make_job(tmp_path)
    _dispatcher(engine).run(JobList([job]))
    assert [work.attempt for work in engine.sent] == [1, 2, MAX_ATTEMPTS]
    assert _problem(job) == "dead"


@pytest.mark.parametrize("make_job", JOBS)
def test_changed_inputs_end_the_run_and_leave_the_job_open(
    make_job: MakeJob, tmp_path: Path
) -> None:
    """Whatever the job, it is cancelled without a result, and other running jobs are stopped."""

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        if work.job == "single/other":
            return (_answer(work), SLOT) if isinstance(work, CheckCommand) else ()
        differs = InputsChangedEvent(job=work.job, attempt=work.attempt, message="    data digest")
        return (differs, SlotsEvent(worker=worker, free=1))

    job, other, ended = make_job(tmp_path), _trial(tmp_path), list[Job]()
    other.record = replace(other.record, key="single/other")
    engine = ScriptedEngine(script, workers=2)
    with pytest.raises(InputsChanged, match=f"{job.key} found other data or another base model"):
        _dispatcher(engine).run(JobList([other, job], ended.append))
    assert {each.key for each in ended} == {job.key, other.key}
    assert other.outcome == Outcome(cause="cancelled")
    if isinstance(job, SingleTrial):
        assert job.outcome == Outcome(cause="cancelled")


def test_a_job_that_ran_out_of_memory_is_not_sent_again(tmp_path: Path) -> None:
    """It would run out of memory again."""
    engine = ScriptedEngine(lambda worker, work: (lost(worker, work, None, "oom", "oom"), SLOT))
    job = _trial(tmp_path)
    _dispatcher(engine).run(JobList([job]))
    assert (len(engine.sent), job.outcome) == (1, Outcome(cause="oom", message="oom"))


@pytest.mark.parametrize("make_job", JOBS)
def test_a_request_that_hangs_is_killed_and_fails_after_three(
    make_job: MakeJob, tmp_path: Path
) -> None:
    """A worker that freezes in a probe, a check or a judgement is waited for within a limit."""
    kind = {_probe: "probe", _trial: "check", _judge: "judge"}[make_job]  # type: ignore[index]
    settings = make_settings(
        *("workers=fake", "workers.engine=inline", "workers.probe_timeout_s=0.3"),
        f"++workers.fake.requests={{{kind}: hang}}",
    )
    job, words = make_job(tmp_path), list[str]()
    engine = open_engine(settings.workers, 1, lambda worker: tmp_path / "log")
    _dispatcher(engine, words).run(JobList([job]))
    engine.close()
    assert (job.attempt, len(words)) == (MAX_ATTEMPTS, MAX_ATTEMPTS)
    assert _problem(job) == "killed: no answer for 0.3 s (workers.probe_timeout_s)"


def test_an_event_of_an_earlier_attempt_is_ignored(tmp_path: Path) -> None:
    """Words that a dead worker had sent do not end the attempt that followed."""
    late = JudgedEvent(job="lora/0000_untuned", attempt=1, losses=None, message="too late")

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        if work.attempt == 1:
            return (lost(worker, work, None, "dead"), SLOT)
        return (late, _answer(work), SLOT)

    job = _judge(tmp_path)
    _dispatcher(ScriptedEngine(script)).run(JobList([job]))
    assert (job.problem, job.losses) == (None, HeldOutLosses())


class Stubborn(JobList[SingleTrial]):
    """A source that cannot continue after its first result."""

    def finished(self, job: SingleTrial) -> None:
        """See JobSource."""
        raise StudyError("the study stops here")


def test_an_error_of_the_source_cancels_what_runs(tmp_path: Path) -> None:
    """Running jobs are stopped, and each has a result, before the error is raised."""
    first, second = _trial(tmp_path / "one"), _trial(tmp_path / "two")
    second.record = TrialRecord("single/second", TrialFolder(tmp_path / "two"), {})
    engine = ScriptedEngine(
        lambda worker, work: (
            ()
            if isinstance(work, SubmitCommand) and work.job == second.key
            else (_answer(work), SlotsEvent(worker=worker, free=1))
        ),
        workers=2,
    )
    with pytest.raises(StudyError, match="stops here"):
        _dispatcher(engine).run(Stubborn([first, second]))
    assert (second.key, "cancelled") in engine.stopped
    assert second.outcome == Outcome(cause="cancelled")


def test_a_dead_worker_that_ran_nothing_costs_no_attempt(tmp_path: Path) -> None:
    """An idle worker's loss takes its slot away until its successor announces one."""
    gone = LostEvent(worker=1, job=None, attempt=0, cause="crash", message="gone")
    engine = ScriptedEngine(lambda worker, work: (gone, _answer(work), SLOT), workers=2)
    job = _judge(tmp_path)
    _dispatcher(engine).run(JobList([job]))
    assert (job.attempt, job.losses) == (1, HeldOutLosses())


class Turns:
    """A supervisor that acts once, as soon as a job is in a given phase."""

    def __init__(self, phase: JobPhase, act: Callable[[Dispatcher], None]) -> None:
        self._phase = phase
        self._act: Callable[[Dispatcher], None] | None = act

    def on_turn(self, dispatcher: Dispatcher, source: JobSource[Any]) -> None:
        """See Supervisor: a pause ends as soon as nothing runs."""
        if self._act and any(job.phase is self._phase for job in dispatcher.busy):
            act, self._act = self._act, None
            act(dispatcher)
        elif dispatcher.mode == "paused" and not dispatcher.busy:
            dispatcher.resume()


def _supervised(engine: Engine, turns: Turns) -> Dispatcher:
    pool = WorkerPool()
    pool.host_with(engine)
    return Dispatcher(pool, StopSignal(), list[str]().append, turns)


class StoppableEngine(ScriptedEngine):
    """A trial runs until it is stopped; its second execution finishes, and checks are answered."""

    def __init__(self, ends_as: Callable[[Work], WorkerEvent]) -> None:
        super().__init__(self._script_of)
        self._ends_as = ends_as
        self._submitted: list[SubmitCommand] = []

    def _script_of(self, worker: int, work: Work) -> Sequence[WorkerEvent]:
        if not isinstance(work, SubmitCommand):
            return (_answer(work), SLOT)
        self._submitted.append(work)
        return () if len(self._submitted) == 1 else (_answer(work), SLOT)

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""
        super().stop(job, cause)
        self._events.extend((self._ends_as(self._submitted[-1]), SLOT))


def _cancelled(work: Work) -> EndedEvent:
    return EndedEvent(job=work.job, attempt=work.attempt, outcome=Outcome(cause="cancelled"))


@pytest.mark.parametrize(
    "ends_as",
    [_cancelled, lambda work: lost(0, work, "paused, and took too long to stop", "")],
    ids=["with a checkpoint", "with its worker"],
)
def test_a_paused_trial_continues_in_the_same_attempt(
    tmp_path: Path, ends_as: Callable[[Work], WorkerEvent]
) -> None:
    """However its first execution ends, the pause costs no attempt."""
    engine = StoppableEngine(ends_as)
    job = _trial(tmp_path)
    _supervised(engine, Turns(JobPhase.RUNNING, Dispatcher.pause)).run(JobList([job]))
    assert engine.stopped == [(job.key, "cancelled")]
    assert [type(work).__name__ for work in engine.sent] == [
        "CheckCommand",
        "SubmitCommand",
        "SubmitCommand",
    ]
    assert (job.attempt, job.outcome) == (1, Outcome(cause="finished"))


def test_a_trial_that_finishes_while_it_is_paused_has_finished(tmp_path: Path) -> None:
    """Its last step crossed the command: it is not trained again."""
    engine = StoppableEngine(_answer)
    job = _trial(tmp_path)
    _supervised(engine, Turns(JobPhase.RUNNING, Dispatcher.pause)).run(JobList([job]))
    assert [type(work).__name__ for work in engine.sent] == ["CheckCommand", "SubmitCommand"]
    assert job.outcome == Outcome(cause="finished")


class DroppableTrial(SingleTrial):
    """A trial that a person may stop for good."""

    def drop(self) -> None:
        """See Job."""


@pytest.mark.parametrize("phase", [JobPhase.CHECKING, JobPhase.RUNNING])
def test_a_dropped_trial_ends_as_cancelled_and_is_not_continued(
    tmp_path: Path, phase: JobPhase
) -> None:
    """Dropped during its check it is never trained; dropped while it trains it is stopped."""
    record = TrialRecord("single/trial", TrialFolder(tmp_path / "trial"), {})
    job = DroppableTrial(record, SETTINGS, NullTracker(), Console(file=io.StringIO()))
    engine = StoppableEngine(_cancelled)
    turns = Turns(phase, lambda dispatcher: dispatcher.drop(job.key))
    if phase is JobPhase.CHECKING:  # the answer comes after the command
        engine._script = lambda worker, work: ()
        engine._events.extend(
            (
                SlotsEvent(worker=1, free=0),
                _answer(CheckCommand(job=job.key, attempt=1, settings=SETTINGS)),
            )
        )
    _supervised(engine, turns).run(JobList([job]))
    assert job.outcome == Outcome(cause="cancelled")
    assert len(engine.sent) == (1 if phase is JobPhase.CHECKING else 2)


class MortalEngine(StoppableEngine):
    """An engine whose killed workers answer nothing more, and whose `Lost` comes late."""

    def __init__(self) -> None:
        super().__init__(_cancelled)
        self.killed: list[int] = []
        self._events.append(SlotsEvent(worker=1, free=1))

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""
        if any(isinstance(event, LostEvent) and event.worker == worker for event in self._events):
            self.sent.append(work)
        else:
            super().send(worker, work)

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        self.killed.append(worker)
        gone = lost(worker, None, reason, "")
        self._events.extend((gone, SlotsEvent(worker=worker, free=1)))


class HastyPerson(Turns):
    """A supervisor that pauses, and resumes as soon as the workers were told to end."""

    def __init__(self, engine: MortalEngine) -> None:
        super().__init__(JobPhase.RUNNING, Dispatcher.pause)
        self._engine = engine

    def on_turn(self, dispatcher: Dispatcher, source: JobSource[Any]) -> None:
        """See Supervisor."""
        if dispatcher.mode == "running" or self._engine.killed:
            super().on_turn(dispatcher, source)


def test_a_resume_right_after_a_pause_hands_nothing_to_a_dying_worker(tmp_path: Path) -> None:
    """The idle workers were killed, and neither loss has arrived: the trial waits for a successor."""
    engine, job = MortalEngine(), _trial(tmp_path)
    limited = LimitedEngine(engine, make_settings("workers=fake").workers)
    _supervised(limited, HastyPerson(engine)).run(JobList([job]))
    assert engine.killed == [0, 1]
    assert (job.attempt, job.outcome) == (1, Outcome(cause="finished"))
    submitted = [work for work in engine.sent if isinstance(work, SubmitCommand)]
    assert len(submitted) == 2


def _pause_and_resume(dispatcher: Dispatcher) -> None:
    dispatcher.pause()
    dispatcher.resume()


def test_a_crash_after_a_short_pause_costs_an_attempt(tmp_path: Path) -> None:
    """A judgement cannot be stopped: the pause changed nothing about it, so three attempts are all."""
    waits = SlotsEvent(worker=1, free=0)
    engine = ScriptedEngine(lambda worker, work: (waits, lost(worker, work, None, "dead"), SLOT))
    job = _judge(tmp_path)
    _supervised(engine, Turns(JobPhase.RUNNING, _pause_and_resume)).run(JobList([job]))
    assert [work.attempt for work in engine.sent] == [1, 2, MAX_ATTEMPTS]


def _pause(dispatcher: Dispatcher, key: str) -> None:
    dispatcher.pause()


@pytest.mark.parametrize("act", [_pause, Dispatcher.drop])
def test_an_interrupt_does_not_wait_for_a_check(
    tmp_path: Path, act: Callable[[Dispatcher, str], None]
) -> None:
    """A worker that checks does not react to Stop, also if the trial was paused or dropped."""
    record = TrialRecord("single/trial", TrialFolder(tmp_path / "trial"), {})
    job = DroppableTrial(record, SETTINGS, NullTracker(), Console(file=io.StringIO()))
    engine = ScriptedEngine(lambda worker, work: (SlotsEvent(worker=1, free=0),))

    def act_and_interrupt(dispatcher: Dispatcher) -> None:
        act(dispatcher, job.key)
        dispatcher.stop(now=True)

    dispatcher = _supervised(engine, Turns(JobPhase.CHECKING, act_and_interrupt))
    with pytest.raises(KeyboardInterrupt):
        dispatcher.run(JobList([job]))
    assert (engine.stopped, job.outcome) == ([], Outcome(cause="cancelled"))


def test_a_trial_dropped_during_its_check_ends_at_once(tmp_path: Path) -> None:
    """Whatever the check finds, the trial was dropped: it is not recorded as refused."""
    record = TrialRecord("single/trial", TrialFolder(tmp_path / "trial"), {})
    job = DroppableTrial(record, SETTINGS, NullTracker(), Console(file=io.StringIO()))
    refusal = Outcome(cause="refused", message="no such layer")

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        answer = CheckedEvent(job=work.job, attempt=1, size=None, refusal=refusal)
        return (SlotsEvent(worker=1, free=0), answer, SLOT)

    turns = Turns(JobPhase.CHECKING, lambda dispatcher: dispatcher.drop(job.key))
    _supervised(ScriptedEngine(script), turns).run(JobList([job]))
    assert job.outcome == Outcome(cause="cancelled")


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("crash", (2, Outcome(cause="finished"))),
        ("oom", (1, Outcome(cause="oom", message="died"))),
    ],
)
def test_a_worker_that_dies_by_itself_in_a_pause_costs_an_attempt(
    tmp_path: Path, cause: Literal["crash", "oom"], expected: tuple[int, Outcome]
) -> None:
    """Only the pause's own kill is free: a trial that kills its workers has three attempts in all."""
    engine = StoppableEngine(lambda work: lost(0, work, None, "died", cause))
    job = _trial(tmp_path)
    _supervised(engine, Turns(JobPhase.RUNNING, Dispatcher.pause)).run(JobList([job]))
    assert (job.attempt, job.outcome) == expected


@pytest.mark.parametrize(
    ("deaths", "expected"),
    [
        (["device"], (2, "finished")),
        (["device", "device"], (2, "error")),
        (["device", "crash", "device"], (3, "error")),
        (["crash", "crash", "device"], (3, "error")),
        (["crash", "device", "crash"], (3, "crash")),
    ],
)
def test_a_trial_that_breaks_its_gpu_twice_is_at_fault(
    tmp_path: Path, deaths: list[DeathCause], expected: tuple[int, str]
) -> None:
    """A broken context costs its worker and an attempt. The second one is the trial's own error."""
    left = list(deaths)

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        if isinstance(work, SubmitCommand) and left:
            return (lost(worker, work, None, "died", left.pop(0)), SLOT)
        return (_answer(work), SLOT)

    job = _trial(tmp_path)
    _dispatcher(ScriptedEngine(script)).run(JobList([job]))
    assert job.outcome is not None
    assert (job.attempt, job.outcome.cause) == expected
