"""What a study makes of a trial that hangs."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sweeper.commands.run_study import run_study
from sweeper.search.study_plan import studies


@pytest.mark.slow
def test_a_hanging_trial_gets_three_attempts_and_ends_as_timeout(tmp_path: Path) -> None:
    """It is killed each time, continues from its checkpoint, then FAIL; the others finish."""
    (plan,) = studies(
        [
            *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "pruner=none"),
            *("~hydra.sweeper.arms.full", "hydra.sweeper.n_trials=3", f"output_dir={tmp_path}"),
            *("++workers.fake.plan={1: hang}", "workers.stall_timeout_s=0.5"),
        ]
    )
    run_study(plan)
    storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
    trials = optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials
    assert [trial.user_attrs["cause"] for trial in trials] == ["finished", "timeout", "finished"]
    assert trials[1].state is TrialState.FAIL
    assert trials[1].user_attrs["attempt"] == 3
    assert "workers.stall_timeout_s" in trials[1].user_attrs["outcome"]["message"]
