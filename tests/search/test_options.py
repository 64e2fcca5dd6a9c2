"""Every sampler and pruner runs a small sweep as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sweeper.config.compose import conf_dir
from tests.conftest import Program

SMALL = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "~hydra.sweeper.arms.full"),
    "hydra.sweeper.n_trials=7",
)
REAL = (
    *("+experiment=lr_rank_sweep", "tracking=none", "finalists=none", "~hydra.sweeper.arms.full"),
    *("hydra.sweeper.n_trials=3", "training.max_steps=6", "evaluation.look_rows=8"),
)
"""The embedded base, trained: half a minute a sweep, most of it loading libraries."""
GOOD_HOPELESS_GOOD = (
    *("sampler=grid", "training.learning_rate=5e-3,1e-6,1e-2", "training.warmup_ratio=0.03"),
    *("adapter.r=4", "adapter.alpha_over_r=2", "adapter.target_modules=all-linear"),
)
SAMPLERS = {
    "tpe": ["sampler=tpe"],
    "lora": ["sampler=lora"],
    "gp": ["sampler=gp"],
    "random": ["sampler=random"],
    "grid": [
        *("sampler=grid", "adapter.r=choice(2,8)", "adapter.alpha_over_r=2"),
        *("adapter.target_modules=mlp", "training.warmup_ratio=range(0.0,0.1,0.05)"),
        "training.learning_rate=1e-3,3e-3",
    ],
    "optuna": ["sampler=optuna", "sampler.class_name=QMCSampler"],
    "optuna NSGA-II": ["sampler=optuna", "sampler.class_name=NSGAIISampler"],
}
PRUNERS = {
    "none": ["pruner=none"],
    "median": ["pruner=median", "pruner.audit_fraction=0.5"],
    "percentile": ["pruner=percentile", "pruner.percentile=25", "pruner.n_startup_trials=3"],
    "gap": ["pruner=gap", "pruner.n_startup_trials=3"],
    "successive_halving": ["pruner=successive_halving", "pruner.n_startup_trials=2"],
    "optuna": [
        *("pruner=optuna", "pruner.class_name=HyperbandPruner"),
        "++pruner.kwargs={min_resource: 250, max_resource: 1000}",
    ],
}


def _document(folder: Path) -> dict[str, object]:
    text = (folder / "outputs" / "lr_rank_sweep" / "results.json").read_text()
    document: dict[str, object] = json.loads(text)["arms"]["lora"]
    return document


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SAMPLERS.values(), ids=SAMPLERS)
def test_sampler_runs_from_the_command_line(
    arguments: list[str], program: Program, tmp_path: Path
) -> None:
    """Seven trials end by themselves, and the best is a trial."""
    result = program(*SMALL, *arguments, "pruner=none", "-m")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stdout + result.stderr
    trials = _document(tmp_path)["trials"]
    assert isinstance(trials, list)
    assert sum(trial["cause"] == "finished" for trial in trials) == 7


@pytest.mark.slow
@pytest.mark.parametrize("arguments", PRUNERS.values(), ids=PRUNERS)
def test_pruner_runs_from_the_command_line(
    arguments: list[str], program: Program, tmp_path: Path
) -> None:
    """Seven trials end as finished or pruned; an unguarded pruner is named as such."""
    result = program(*SMALL, *arguments, "workers.fake.step_seconds=0.02", "-m")
    assert result.returncode == 0, result.stdout + result.stderr
    trials = _document(tmp_path)["trials"]
    assert isinstance(trials, list)
    causes = [trial["cause"] for trial in trials]
    assert len(causes) == 7
    assert set(causes) <= {"finished", "pruned"}
    assert ("unguarded" in result.stdout) == ("pruner=optuna" in arguments)
    assert "pruned" not in causes or arguments != ["pruner=none"]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("arguments", SAMPLERS.values(), ids=SAMPLERS)
def test_sampler_searches_with_the_real_trainer(
    arguments: list[str], program: Program, tmp_path: Path
) -> None:
    """Three trials of the embedded base are trained to their end, at three different points."""
    result = program(*REAL, *arguments, "pruner=none", "-m", timeout_s=900)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = _document(tmp_path)["trials"]
    assert isinstance(trials, list)
    assert [(trial["cause"], trial["steps"]) for trial in trials] == [("finished", 6)] * 3
    assert len({json.dumps(trial["params"]) for trial in trials}) == 3


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("arguments", PRUNERS.values(), ids=PRUNERS)
def test_pruner_judges_the_real_trainer(
    arguments: list[str], program: Program, tmp_path: Path
) -> None:
    """A good rate, a hopeless one, a good one: the guarded pruners stop the second, none stops none."""
    waits = ["pruner.n_startup_trials=1", "pruner.audit_fraction=0"]
    # the gap needs the noise of three trials, and this study has three in all
    if {"pruner=none", "pruner=optuna", "pruner=gap"} & {*arguments}:
        waits = []
    result = program(*REAL, *GOOD_HOPELESS_GOOD, *arguments, *waits, "-m", timeout_s=900)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = _document(tmp_path)["trials"]
    assert isinstance(trials, list)
    causes = {trial["number"]: trial["cause"] for trial in trials}
    assert causes.keys() == {0, 1, 2}
    assert set(causes.values()) <= {"finished", "pruned"}
    if waits:
        assert (causes[0], causes[1]) == ("finished", "pruned")
    if "pruner=none" in arguments:
        assert set(causes.values()) == {"finished"}


def test_every_option_of_the_groups_is_among_them() -> None:
    """A new file under conf/sampler or conf/pruner must be run here."""
    for group, options in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        names = {path.stem for path in (conf_dir() / group).glob("*.yaml")}
        missing = sorted(names - set(options))
        assert not missing, f"add {missing} to {group.upper()}S above, with what one needs to run"


@pytest.mark.slow
def test_budget_and_short_keys_work_on_the_command_line(program: Program) -> None:
    """What remains is used, and the printed command has the keys in full."""
    result = program(*SMALL, "hydra.sweeper.n_trials=2", "budget.wall_clock=1h", "-m")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hydra.sweeper.budget.wall_clock=1h" in result.stdout
    assert re.search(r"arm lora: 0 h 59 min left|arm lora: 59 min \d+ s left", result.stdout)
