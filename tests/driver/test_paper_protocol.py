"""protocol=paper: no priors, no stops, equal device seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.commands.run_study import run_study
from sweeper.config.space import Interval
from sweeper.reporting.verdict import judge
from sweeper.search.study_plan import studies
from tests.driver.test_arm_search import FAKE

RATE = "training.learning_rate"
PRIOR = "hydra.sweeper.priors=[{training.learning_rate: 0.001}]"


def test_one_word_removes_priors_and_stops_from_every_arm() -> None:
    """Priors, pruner, early stopping and the grid are gone from both arms, and seconds are equal."""
    (plan,) = studies([*FAKE, PRIOR, "hydra.sweeper.protocol=paper"])
    assert plan.study.pruner.name == "none"
    assert plan.study.fairness.equal == "device_seconds"
    for arm in plan.arms:
        assert not arm.priors
        assert not arm.refine
        assert arm.settings.training.early_stopping_patience is None
    full = plan.arms[1]
    assert full.space[RATE] == Interval(3e-5, 3e-3, log=True)
    assert (full.sampler.name, full.n_trials) == ("lora", 24)


def test_without_it_a_study_is_its_own() -> None:
    """The default keeps the experiment's pruner, stops, priors and grid."""
    (plan,) = studies([*FAKE, PRIOR])
    assert plan.study.pruner.name == "median"
    assert len(plan.arms[0].priors) == 1
    assert plan.arms[1].sampler.name == "grid"
    assert plan.arms[1].settings.training.early_stopping_patience == 2


@pytest.mark.slow
def test_arms_get_equal_device_seconds(tmp_path: Path) -> None:
    """Trials of the full arm take as long as LoRA's, and it ends near LoRA's seconds."""
    overrides = ("workers.fake.step_seconds=0.02", "hydra.sweeper.n_trials=8", "finalists=none")
    (plan,) = studies([*FAKE, *overrides, "hydra.sweeper.protocol=paper", f"output_dir={tmp_path}"])
    results = run_study(plan)
    lora, full = results.arms
    assert 0.8 <= full.seconds / lora.seconds <= 1.1
    assert not [trial for arm in results.arms for trial in arm.trials if not trial.complete]
    assert "Protocol paper: no priors, no stops, equal device-seconds." in judge(results).words
