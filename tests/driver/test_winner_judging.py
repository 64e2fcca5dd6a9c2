"""The judging of a winner on an engine without workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sweeper.core.outcome import ExampleLosses, HeldOutLosses, Outcome
from sweeper.core.paths import StudyFolder
from sweeper.core.signals import StopSignal
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import Candidate
from sweeper.driver.study_services import StudyServices
from sweeper.driver.winner_judging import WinnerJudging
from sweeper.driver.worker_pool import WorkerPool
from sweeper.reporting.console import make_console
from sweeper.reporting.finalist_results import FinalistRanking
from sweeper.reporting.live_view import QuietView
from sweeper.reporting.study_progress import StudyProgress
from sweeper.search.study_plan import studies
from sweeper.tracking.tracker import NullTracker
from sweeper.workers.fake_runner import FakeRunner
from sweeper.workers.protocol import JudgeCommand, JudgedEvent, SlotsEvent, Work, WorkerEvent
from tests.driver.scripted import ScriptedEngine

LOSSES = ExampleLosses(nll=(3.0,), tokens=(1,))


def test_a_judgement_is_stored_before_the_next_one_ends(tmp_path: Path) -> None:
    """Stopped while the winner is judged: the untuned base is not judged again."""
    (plan,) = studies(["+experiment=lr_rank_sweep", "workers=fake", f"output_dir={tmp_path}"])
    arm, interrupt, pool = plan.arms[0], StopSignal(), WorkerPool()
    judged: list[str] = []

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        judged.append(work.job)
        if len(judged) == 2:
            interrupt.request()
            return ()
        losses = HeldOutLosses(test=LOSSES, general=LOSSES)
        answer = JudgedEvent(job=work.job, attempt=1, losses=losses, message=None)
        return (answer, SlotsEvent(worker=worker, free=1))

    pool.host_with(ScriptedEngine(script))
    candidate = Candidate(
        arm,
        7,
        {},
        arm.settings.trial,
        arm.settings.trial,
        Outcome(cause="finished", best_value=2.0),
    )
    folder, board = StudyFolder(tmp_path / "study"), StudyProgress(plan.objective)
    services = StudyServices(folder, NullTracker(), QuietView(make_console()), board, {}, "uuid")
    facts = FakeRunner(plan.settings.workers.fake).probe(arm.settings.trial)
    judging = WinnerJudging(services, True, candidate, facts)
    final = FinalistRanking(finalists=(candidate.finalist(),), winner=7)
    with pytest.raises(KeyboardInterrupt):
        judging.run(final, Dispatcher(pool, interrupt, list[str]().append))
    assert judged == ["lora/0007_untuned", "lora/0007_seed_0"]
    stored = {path.parents[1].name for path in folder.path.rglob("trial_0007_untuned.json")}
    assert stored == {"test", "general"}

    interrupt.number = None
    pool.close()
    pool.host_with(ScriptedEngine(script))
    judging.run(final, Dispatcher(pool, interrupt, list[str]().append))
    assert judged[2:] == ["lora/0007_seed_0"]


def test_a_winner_is_judged_in_every_form_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model of a QLoRA winner is judged as trained, on the full base and merged, each once."""
    (plan,) = studies(["+experiment=lr_rank_sweep", "workers=fake", f"output_dir={tmp_path}"])
    arm, pool = plan.arms[0], WorkerPool()
    asked: list[tuple[str, str, str]] = []

    def script(worker: int, work: Work) -> Sequence[WorkerEvent]:
        assert isinstance(work, JudgeCommand)
        settings = work.settings
        form = settings.evaluation.serve_as
        asked.append((work.job.removeprefix("lora/0007_"), settings.quantization.kind, form))
        losses = HeldOutLosses(test=LOSSES, general=LOSSES)
        answer = JudgedEvent(job=work.job, attempt=1, losses=losses, message=None)
        return (answer, SlotsEvent(worker=worker, free=1))

    settings = arm.settings.trial
    outcome = Outcome(cause="finished", best_value=2.0)
    candidate = Candidate(arm, 7, {}, settings, settings, outcome)
    folder, board = StudyFolder(tmp_path / "study"), StudyProgress(plan.objective)
    folder.trial("lora", 7).adapter.mkdir(parents=True)
    services = StudyServices(folder, NullTracker(), QuietView(make_console()), board, {}, "uuid")
    facts = FakeRunner(plan.settings.workers.fake).probe(settings)
    judging = WinnerJudging(services, True, candidate, facts)
    monkeypatch.setattr(WinnerJudging, "_owns", lambda *_: True)
    final = FinalistRanking(finalists=(candidate.finalist(),), winner=7)
    for _ in range(2):
        pool.host_with(ScriptedEngine(script))
        ended = judging.run(final, Dispatcher(pool, StopSignal(), list[str]().append))
        assert list(ended.served) == ["trained", "unquantized", "merged"]
        pool.close()
    assert asked == [
        ("untuned", "nf4", "trained"),
        ("seed_0", "nf4", "trained"),
        ("served_unquantized", "none", "unquantized"),
        ("served_merged", "none", "merged"),
    ]
