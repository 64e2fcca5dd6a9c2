"""Points beside the best one of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import optuna
import pytest

from sweeper.commands.run_study import run_study
from sweeper.core.errors import ConfigError
from sweeper.driver import study_run
from sweeper.driver.study_run import StudyRun
from sweeper.reporting.results import StudyResults
from sweeper.search.refinement import REFINE
from sweeper.search.study_plan import studies
from tests.driver.test_arm_search import FAKE

RATE, WARMUP = "training.learning_rate", "training.warmup_ratio"


def _run(folder: Path, *overrides: str) -> StudyResults:
    (plan,) = studies([*FAKE, f"output_dir={folder}", *overrides])
    return run_study(plan)


def test_a_grid_is_refined_around_its_best_rate(tmp_path: Path) -> None:
    """Two rates beside the best, then the best with LoRA's warm-up. A second start adds nothing."""
    # From the recipe, LoRA's winner would have the warm-up of the full arm
    overrides = ("hydra.sweeper.n_trials=2", "pruner=none", "finalists=none")
    overrides += ("hydra.sweeper.priors=[]",)
    # Of fewer steps, both warm-ups would be the same.
    overrides += ("workers.fake.steps=200",)
    results = _run(tmp_path, *overrides)
    lora, full = results.arms
    grid = [trial for trial in full.trials if trial.number < 5]
    best = min(grid, key=lambda trial: trial.value or 9.0)
    assert best.params[RATE] == 3e-4
    beside = {trial.number: trial.params for trial in full.trials if trial.number >= 5}
    assert [beside[number] for number in (5, 6)] == [{RATE: 0.000173}, {RATE: 0.000548}]
    assert full.best is not None
    assert lora.best is not None
    before = min((t for t in full.trials if t.number < 7), key=lambda trial: trial.value or 9.0)
    assert beside[7] == {**before.params, WARMUP: lora.best.params[WARMUP]}
    assert full.best.params[RATE] == 0.000548
    assert (full.refined, full.tried) == (3, 8)
    again = _run(tmp_path, *overrides)
    assert [len(arm.trials) for arm in again.arms] == [2, 8]


def test_a_warmup_of_as_many_steps_is_not_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 20 steps, ratios of 0.03 and 0.045 both warm up for one, so the same model would come out."""
    searched = "hydra.sweeper.params={training.warmup_ratio: 'choice(0.045)'}"
    fixed = ("hydra.sweeper.n_trials=1", "workers.fake.steps=20", "finalists=none", "pruner=none")
    full = _run(tmp_path, *fixed, searched).arms[1]
    assert full.refined == 2
    assert not any(WARMUP in trial.params for trial in full.trials)
    said = "the warm-up of arm lora's winner is not tried: it has as many steps (1)"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_warmup_that_an_earlier_version_tried_is_not_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trained a warm-up of as many steps. A start of today neither repeats nor denies that."""
    searched = "hydra.sweeper.params={training.warmup_ratio: 'choice(0.045)'}"
    fixed = ("hydra.sweeper.n_trials=1", "workers.fake.steps=20", "finalists=none", "pruner=none")
    with monkeypatch.context() as patch:
        patch.setattr(study_run, "twin_warmup", lambda *_: None)
        assert _run(tmp_path, *fixed, searched).arms[1].refined == 3
    assert _run(tmp_path, *fixed, searched).arms[1].refined == 3
    assert "is not tried" not in capsys.readouterr().out


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_points_beside_the_best_have_a_part_of_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that was stopped after its grid still tries them when it is continued for an hour."""
    # From the recipe, LoRA's winner would have the warm-up of the full arm
    overrides = ("hydra.sweeper.n_trials=2", "pruner=none", "finalists=none")
    overrides += ("hydra.sweeper.priors=[]",)
    overrides += ("workers.fake.steps=200",)
    with monkeypatch.context() as patch:
        patch.setattr(StudyRun, "_refinement", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, *overrides)
    results = _run(tmp_path, *overrides, "hydra.sweeper.budget.wall_clock=1h")
    assert results.arms[1].refined == 3


@pytest.mark.slow
def test_a_study_of_before_is_not_refined(tmp_path: Path) -> None:
    """A study that was opened without it keeps its answer, whatever the experiment says now."""
    off = "hydra.sweeper.arms.full.refine=false"
    overrides = ("hydra.sweeper.n_trials=2", "finalists=none")
    assert len(_run(tmp_path, *overrides, off).arms[1].trials) == 5
    assert len(_run(tmp_path, *overrides).arms[1].trials) == 5
    storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
    full = optuna.load_study(study_name="lr_rank_sweep/full", storage=storage)
    assert full.user_attrs[REFINE] is False


def test_only_a_grid_can_be_refined() -> None:
    """Another sampler chooses between its points by itself, and the message says what to set."""
    with pytest.raises(
        ConfigError, match=r"refine is true and sampler is tpe: only a grid is refined"
    ):
        studies([*FAKE, "hydra.sweeper.arms.full.sampler=tpe"])
