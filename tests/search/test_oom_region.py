"""A part of the space needs more memory than there is: learnt, avoided, and never the answer."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sweeper.commands.run_study import run_study
from sweeper.reporting.results import ArmResult
from sweeper.search.study_plan import studies
from sweeper.search.telling import counts

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("~hydra.sweeper.arms.full", "finalists=none", "pruner=none", "workers.fake.step_seconds=0"),
    "workers.fake.steps=2",
)
REGION = (
    *("training.learning_rate=interval(4e-3, 6e-3)", "training.warmup_ratio=0.03"),
    *("adapter.r=int(interval(1, 64))", "adapter.alpha_over_r=1", "adapter.target_modules=mlp"),
    *("workers.fake.room_mib=0.49", "hydra.sweeper.n_trials=20", "hydra.sweeper.priors=[]"),
)
"""16,000 bytes for each of r: beyond r = 32, where the fake loss would be lower still, nothing fits."""


def _run(folder: Path, *overrides: str) -> tuple[ArmResult, list[FrozenTrial]]:
    (plan,) = studies([*FAKE, f"output_dir={folder}", *overrides])
    (arm,) = run_study(plan).arms
    storage = f"sqlite:///{folder / 'lr_rank_sweep' / 'study.db'}"
    return arm, optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials


def _is_oom(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs["cause"] == "oom")


# Twenty trials are too few for TPE: over 30 seeds, its later half is better in 15
@pytest.mark.parametrize(
    ("sampler", "avoids"),
    [pytest.param("tpe", False, marks=pytest.mark.slow), ("lora", True), ("gp", True)],
)
def test_a_sampler_that_learns_finds_the_border(sampler: str, avoids: bool, tmp_path: Path) -> None:
    """None is FAIL; the best fits and is near the border; a process runs less out of memory later."""
    arm, trials = _run(tmp_path, *REGION, f"sampler={sampler}")
    assert sum(map(counts, trials)) == 20
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    half = len(trials) // 2
    first, last = sum(map(_is_oom, trials[:half])), sum(map(_is_oom, trials[half:]))
    assert last < first or not avoids
    assert arm.best is not None
    assert 16 <= int(str(arm.best.params["adapter.r"])) <= 32


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_a_sampler_that_cannot_learn_still_ends(sampler: str, tmp_path: Path) -> None:
    """Trials without room for a step do not count, and the total is reached all the same."""
    named = ["hydra.sweeper.sampler.class_name=QMCSampler"] if sampler == "optuna" else []
    arm, trials = _run(tmp_path, *REGION, f"sampler={sampler}", *named)
    assert sum(map(counts, trials)) == 20
    assert any(map(_is_oom, trials))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert arm.best is not None
    assert int(str(arm.best.params["adapter.r"])) <= 32


def test_a_space_without_room_anywhere_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice as many trials as were wanted, none of which counts, are enough to see it."""
    arm, trials = _run(
        tmp_path,
        *REGION,
        "sampler=random",
        "workers.fake.room_mib=0.01",
        "hydra.sweeper.n_trials=3",
    )
    assert arm.best is None
    assert [_is_oom(trial) for trial in trials] == [True] * 6
    assert "arm lora ends at 0 of 3 trials" in capsys.readouterr().out
