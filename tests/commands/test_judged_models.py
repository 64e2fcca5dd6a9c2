"""The models that a forecast counts are those that a study then judges."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sweeper.commands.run_study import run_study
from sweeper.commands.study_forecast import ArmForecast
from sweeper.core.outcome import TrialTiming
from sweeper.driver.finalist_jobs import JudgeJob
from sweeper.driver.jobs import JobPhase
from sweeper.search.study_plan import studies
from sweeper.workers.protocol import Engine


@pytest.mark.parametrize(
    "finalists",
    [
        ("finalists=tiny",),
        ("finalists=real",),
        ("finalists=real", "hydra.sweeper.finalists.fresh_seeds=0"),
        ("finalists=real", "hydra.sweeper.finalists.test=false"),
        ("finalists=tiny", "evaluation.general_text.source=null"),
        ("finalists=none",),
    ],
    ids=" ".join,
)
def test_each_judged_model_is_counted(
    finalists: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untuned base, seeds, recipe and forms on the test split; base and seeds on general text."""
    judged: Counter[tuple[str, str]] = Counter()
    send = JudgeJob.send

    def counted(job: JudgeJob, engine: Engine, worker: int) -> JobPhase:
        judged.update((job.key.split("/")[0], kind) for kind in job.kinds)
        return send(job, engine, worker)

    monkeypatch.setattr(JudgeJob, "send", counted)
    (plan,) = studies(
        [
            *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline"),
            *("workers.fake.step_seconds=0.0", "tracking=none", "pruner=none"),
            *("hydra.sweeper.n_trials=8", f"output_dir={tmp_path}"),
            *finalists,
        ]
    )
    run_study(plan)
    assert len(plan.arms) == 2
    for arm in plan.arms:
        most = plan.judged_at_most(arm)
        # the fake trainer stores no weights, so its winners are served in no form
        forms = arm.settings.trial.serve_forms if plan.study.finalists.top else ()
        served = len(forms) - (0 if plan.study.finalists.fresh_seeds else bool(forms))
        tested = most.test - served if most.test else 0
        assert judged[arm.name, "general"] == most.general
        # the recipe is judged unless it has won
        recipe = plan.recipe_seeds_at_most(arm)
        assert judged[arm.name, "test"] in (tested, tested - recipe)


def test_the_judged_models_take_their_time() -> None:
    """Each costs the seconds of its text, and an arm of whole models loads each of them."""
    plan = studies(["+experiment=lr_rank_sweep"])[0]
    timing = TrialTiming(
        rows={"test": 10}, step_s=1.0, steps=1, test_s=4.0, general_s=1.0, load_s=100.0
    )
    forecast = ArmForecast.of(plan, plan.arms[1], timing)
    # base and three seeds on both texts
    assert forecast.judging_s == 4 * (4.0 + 1.0) + 4 * 100.0
    without = timing.model_copy(update={"rows": {}})
    assert ArmForecast.of(plan, plan.arms[1], without).judging_s == 4 * 1.0 + 4 * 100.0
