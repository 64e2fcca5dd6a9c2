"""The forecast at the start of a study, without timed steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sweeper.commands.run_study import run_study
from sweeper.core.outcome import ANSWERING_SECONDS, ArmBaseline
from sweeper.driver.start_forecast import StartForecast, estimated_seconds
from sweeper.search.searched_epochs import with_few_rows
from sweeper.search.study_plan import ArmPlan, StudyPlan, studies
from sweeper.workers.devices import DeviceSurvey
from sweeper.workers.fake_runner import FakeRunner
from sweeper.workers.worker_count import MachineShare

FAKE = ("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none")


def _plan(*overrides: str) -> StudyPlan:
    (plan,) = studies(["+experiment=lr_rank_sweep", *FAKE, *overrides])
    return plan


def _facts(arm: ArmPlan, **changes: float | Mapping[str, int] | None) -> ArmBaseline:
    facts = FakeRunner(arm.settings.workers.fake).probe(arm.settings.trial)
    return facts.model_copy(update=changes)


def _said(
    plan: StudyPlan, facts: ArmBaseline, done: int = 0, free_mib: float = 8000.0
) -> list[str]:
    said: list[str] = []
    machine = MachineShare(2, free_mib, DeviceSurvey(), {})
    forecast = StartForecast(plan, said.append, lambda: machine)
    forecast.open_arm(plan.arms[0], facts, done, 2)
    forecast.trial_finished(plan.arms[0], 11, None, 2)
    forecast.trial_finished(plan.arms[0], 10, 60.0, 2)
    forecast.trial_finished(plan.arms[0], 9, 60.0, 2)
    return said


def test_trainings_memory_and_hours_come_at_the_start() -> None:
    """Without a timed judgement the hours come after the first finished trial, once."""
    plan = _plan()
    total, memory, unknown, told = _said(plan, _facts(plan.arms[0]))
    assert total == (
        "trainings: 23 to 29 in all: lora 12 in the search and 3 with further seeds "
        "(and up to 3 of its recipe); "
        "full 5 in the search (and up to 3 beside the best of its grid) and 3 with further seeds"
    )
    assert "8,000 MiB are free" in memory
    assert unknown == "arm lora: hours unknown until its first finished trial"
    # 16 more trainings of a minute by two workers, 3 of them only if the recipe does not win
    assert told.startswith(
        "arm lora: about 8 min 00 s with 2 workers if no trial ends early: 10 in"
    )


def test_a_baseline_that_does_not_fit_is_said_at_the_start() -> None:
    """Before hours of LoRA trials, not when its own arm begins."""
    plan = _plan()
    said = _said(plan, _facts(plan.arms[0]), free_mib=1210.0)
    assert "full needs about" in said[1]
    assert "DOES NOT FIT" in said[1]


def test_hours_come_from_the_probes_judging_time() -> None:
    """A trained row costs three judged ones, and every look and the last judgement count."""
    arm = _plan("training.max_steps=100", "training.eval_steps=100").arms[0]
    facts = _facts(arm, judging_s=2.0, rows={"train": 500, "validation": 40})
    rows = 3 * 100 * arm.settings.training.effective_batch_size + 40 + 40
    assert estimated_seconds(arm, facts) == pytest.approx(rows * 2.0 / 40)


@pytest.mark.parametrize(("objective", "times"), [("loss", 1), ("rougeL", 1 + 2)])
def test_hours_count_answers_as_often_as_they_are_written(objective: str, times: int) -> None:
    """A trial writes them at its end, and at its looks only if they choose it."""
    names = ("training.max_steps=100", "training.eval_steps=50", f"objective={objective}")
    arm = _plan(*names, "evaluation.generation.num_examples=10").arms[0]
    facts = _facts(arm, judging_s=2.0, rows={"train": 500, "validation": 40})
    measured = {**facts.base_metrics, ANSWERING_SECONDS: 100.0}
    writing = facts.model_copy(update={"base_metrics": measured})
    without, seconds = estimated_seconds(arm, facts), estimated_seconds(arm, writing)
    assert without is not None
    assert seconds == pytest.approx(without + times * 100.0)


def test_hours_count_the_mean_of_the_searched_epochs() -> None:
    """Between one and five epochs of few rows, a trial trains three times as long as with one."""
    plan = _plan("space=real", "training=real")
    one = _plan("space=real", "training=real", "training.num_train_epochs=1").arms[0]
    facts = _facts(one, judging_s=2.0, rows={"train": 640, "validation": 40})
    once, mean = (estimated_seconds(with_few_rows(arm, 640), facts) for arm in (one, plan.arms[0]))
    assert once is not None
    assert mean is not None
    assert mean - once == pytest.approx(2 * 3 * 640 * 2.0 / 40)


def test_a_resumed_study_says_only_what_is_left() -> None:
    """No totals again."""
    plan = _plan()
    said = _said(plan, _facts(plan.arms[0]), done=4)
    assert said[0] == "arm lora: hours unknown until its first finished trial"


@pytest.mark.slow
def test_the_forecast_is_what_then_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainings in all are those whose folders a whole study leaves."""
    names = ("finalists=real", "pruner=none", "hydra.sweeper.n_trials=3", f"output_dir={tmp_path}")
    plan = _plan(*names, "hydra.sweeper.n_jobs=1")
    run_study(plan)
    shown = capsys.readouterr().out
    assert "trainings: " in shown
    least, _, most = shown.partition("trainings: ")[2].partition(" in all")[0].partition(" to ")
    trained = len(list(tmp_path.rglob("outcome.json")))
    assert int(least) <= trained <= int(most or least)
