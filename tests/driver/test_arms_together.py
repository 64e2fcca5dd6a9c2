"""Slots that the end of one arm leaves empty are filled by the next arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from sweeper.commands.run_study import run_study
from sweeper.commands.study_conclusion import StudyConclusion
from sweeper.core.errors import StudyError
from sweeper.core.outcome import HeldOutLosses
from sweeper.core.signals import StopSignal
from sweeper.driver import study_run
from sweeper.driver.arm_probe import ProbeJob
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import JudgeJob
from sweeper.driver.job_sequences import JobSequence, JobSequences
from sweeper.driver.jobs import MAX_ATTEMPTS, Job, JobList, JobPhase, JobSource
from sweeper.driver.worker_pool import WorkerPool
from sweeper.search.study_plan import studies
from sweeper.workers.fake_runner import FakeRunner
from sweeper.workers.protocol import JudgedEvent, SlotsEvent, Work, WorkerEvent, lost
from tests.conftest import make_settings
from tests.driver.scripted import Script, ScriptedEngine
from tests.driver.threaded import ThreadedEngine, opener

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "finalists=none"),
    # Of fewer steps, the warm-up of the LoRA winner would be that of the full arm.
    *("++workers.fake.steps=40", "pruner=none"),
    *("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=3", "hydra.sweeper.priors=[]"),
)
LAST = "lora/0002"
SETTINGS = make_settings("workers=fake").trial
ANSWERED = ProbeJob.on_event


def _run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *overrides: str,
    after: Mapping[str, str] = MappingProxyType({}),
    last_s: float = 0.0,
) -> ThreadedEngine:
    """Run a study whose LoRA arm ends with one long trial, and return its engine."""
    opened: list[ThreadedEngine] = []
    pace = opener(lambda key: last_s if key == LAST else 0.0, opened, after)
    monkeypatch.setattr(study_run, "open_engine", pace)
    monkeypatch.setattr(StudyConclusion, "_write", lambda self, *results: None)
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    try:
        run_study(plan)
    finally:
        (engine,) = opened
    return engine


def test_the_next_arm_takes_what_the_last_trial_leaves_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long LoRA's last trial takes, the other worker tries the grid and two rates meanwhile.

    Only the point with the warm-up of LoRA's winner waits for it.
    """
    engine = _run(tmp_path, monkeypatch, after={LAST: "full/0006"})
    at = engine.order.index
    assert at(f"{LAST} begins") < at("full/0000 begins")
    assert at("full/0006 ends") < at(f"{LAST} ends") < at("full/0007 begins")


@pytest.mark.slow
def test_an_arm_that_gets_the_time_of_the_first_one_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With protocol=paper the seconds of the first search decide about the second one."""
    engine = _run(tmp_path, monkeypatch, "hydra.sweeper.protocol=paper")
    ends = [word for word in engine.order if word.startswith("lora") and word.endswith("ends")]
    assert engine.order.index("full/0000 begins") > engine.order.index(ends[-1])


def _lose_full_probe(job: ProbeJob, event: WorkerEvent) -> JobPhase | None:
    """Stand for a worker that dies in each attempt at the probe of the full arm."""
    if job.name != "full":
        return ANSWERED(job, event)
    job.fail("crash", "no base")
    return JobPhase.ENDED


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_an_arm_that_cannot_begin_stops_the_last_trial_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """It is cancelled with its checkpoint, so that the same command continues it."""
    inner = FakeRunner.probe

    def probe(self: FakeRunner, settings: Any, adopted: Path | None = None) -> Any:
        if settings.adapter.method == "none":
            raise StudyError("no base")
        return inner(self, settings, adopted)

    if dies:
        monkeypatch.setattr(ProbeJob, "on_event", _lose_full_probe)
    else:
        monkeypatch.setattr(FakeRunner, "probe", probe)
    with pytest.raises(StudyError, match="no base"):
        _run(tmp_path, monkeypatch, last_s=0.5)
    outcome = tmp_path / "lr_rank_sweep" / "lora" / "trial_0002" / "outcome.json"
    assert '"cancelled"' in outcome.read_text()


@pytest.mark.slow
def test_an_arm_that_gave_its_device_time_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA's last trial fails when the full arm has the rest of the hours: it comes after that arm."""
    failing = ("++workers.fake.plan={2: error}", "hydra.sweeper.budget.device_hours=100")
    engine = _run(tmp_path, monkeypatch, *failing, after={LAST: "full/0000"})
    assert engine.order.index("lora/0003 begins") > engine.order.index("full/0006 ends")
    assert "lora/0003 ends" in engine.order


def _judge(name: str) -> JudgeJob:
    return JudgeJob(name, SETTINGS, None, ("test",))


def _answers(worker: int, work: Work) -> Sequence[WorkerEvent]:
    answer = JudgedEvent(job=work.job, attempt=1, losses=HeldOutLosses(), message=None)
    return (answer, SlotsEvent(worker=worker, free=1))


def _sent(*sequences: Iterator[JobSource[Any] | None]) -> list[str]:
    """Run sequences on one worker, and return the jobs in the order in which they were sent."""
    pool, engine = WorkerPool(), ScriptedEngine(_answers)
    pool.host_with(engine)
    words = list[str]()
    dispatcher = Dispatcher(pool, StopSignal(), words.append)
    dispatcher.run(JobSequences([JobSequence(each) for each in sequences]))
    return [work.job for work in engine.sent]


def test_the_code_between_two_sources_runs_when_all_jobs_before_it_have_ended() -> None:
    """What it reads is whole, and the run ends after the code behind the last source."""
    ended: list[str] = []

    def sources() -> Iterator[JobSource[Any] | None]:
        yield JobList([_judge("a"), _judge("b")], finished=lambda job: ended.append(job.key))
        ended.append("between")
        yield JobList([_judge("c")], finished=lambda job: ended.append(job.key))
        ended.append("after")

    assert _sent(sources()) == ["a", "b", "c"]
    assert ended == ["a", "b", "between", "c", "after"]


def test_a_sequence_that_waits_for_another_one_begins_once_it_may() -> None:
    """None is asked again; a wait ends the run neither early nor never."""
    ready: list[Job] = []

    def waiting() -> Iterator[JobSource[Any] | None]:
        while len(ready) < 2:
            yield None
        yield JobList([_judge("late")])

    def working() -> Iterator[JobSource[Any] | None]:
        yield JobList([_judge("a")], finished=ready.append)
        yield JobList([_judge("b")], finished=ready.append)

    assert _sent(waiting(), working()) == ["a", "b", "late"]


def _nothing() -> Iterator[JobSource[Any] | None]:
    yield from ()


def test_sequences_without_a_job_end_at_once() -> None:
    """Also among others."""
    make: Callable[[], Iterator[JobSource[Any] | None]] = _nothing
    assert _sent(make()) == []
    assert _sent(make(), iter([JobList([_judge("a")])]), make()) == ["a"]


class BusyEngine(ScriptedEngine):
    """An engine whose silence is an error, because no worker of it will ever be free again."""

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        event = super().next_event(timeout_s)
        assert event is not None, "the run waits for a worker"
        return event


def _run_busy(script: Script, *sequences: Iterator[JobSource[Any] | None], workers: int) -> None:
    pool = WorkerPool()
    pool.host_with(BusyEngine(script, workers))
    dispatcher = Dispatcher(pool, StopSignal(), lambda words: None)
    dispatcher.run(JobSequences([JobSequence(each) for each in sequences]))


def test_a_run_whose_last_worker_dies_with_its_last_job_waits_for_no_other_worker() -> None:
    """The third attempt of the last job is lost, and no successor has announced itself."""
    ended: list[str] = []

    def sources() -> Iterator[JobSource[Any] | None]:
        yield JobList([_judge("a")], finished=lambda job: ended.append(job.key))
        ended.append("after")

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        dead = lost(worker, work, None, "dead")
        return (dead,) if work.attempt == MAX_ATTEMPTS else (dead, SlotsEvent(worker=0, free=1))

    _run_busy(script, sources(), workers=1)
    assert ended == ["a", "after"]


def test_the_end_of_an_arm_is_noticed_while_another_arm_has_all_workers() -> None:
    """The code behind the first arm's last job runs before the end of the second arm's long job."""
    ended: list[str] = []

    def short() -> Iterator[JobSource[Any] | None]:
        yield JobList([_judge("short")], finished=lambda job: ended.append(job.key))
        ended.append("after short")

    def long() -> Iterator[JobSource[Any] | None]:
        yield JobList([_judge("long")], finished=lambda job: ended.append(job.key))

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        answers = [
            JudgedEvent(job=key, attempt=1, losses=HeldOutLosses(), message=None)
            for key in ("short", "long")
        ]
        # Both answers come when both jobs run, and no slot becomes free before the second one
        return answers if work.job == "long" else ()

    _run_busy(script, short(), long(), workers=2)
    assert ended == ["short", "after short", "long"]
