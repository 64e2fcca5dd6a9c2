"""Every sampler keeps to resumes, several workers, impossible points, branches and tiny studies.

The draws themselves are in test_samplers, kill -9 and the speed of workers in tests/driver.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import optuna
import pytest

from sweeper.commands.run_study import run_study
from sweeper.config.study_settings import SamplerName
from sweeper.driver import study_run
from sweeper.reporting.results import ArmResult
from sweeper.search.record_prefix import turn_of
from sweeper.search.study_plan import studies
from tests.driver.threaded import opener

FAKE = (
    *("workers=fake", "tracking=none", "finalists=none", "pruner=none"),
    *("workers.fake.step_seconds=0", "workers.fake.steps=2"),
)
FLAT = ("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full")
GRID = (
    *("training.learning_rate=1e-3,3e-3,1e-2", "adapter.r=2,4,8,16", "adapter.alpha_over_r=2"),
    *("adapter.target_modules=mlp", "training.warmup_ratio=0.03"),
)
SAMPLERS: dict[str, tuple[str, ...]] = {
    "tpe": ("sampler=tpe",),
    "lora": ("sampler=lora",),
    "gp": ("sampler=gp",),
    "random": ("sampler=random",),
    "grid": ("sampler=grid", *GRID),
    "NSGA-II": ("sampler=optuna", "hydra.sweeper.sampler.class_name=NSGAIISampler"),
    "QMC": ("sampler=optuna", "hydra.sweeper.sampler.class_name=QMCSampler"),
}
QUICK = "lora"
"""The one whose cases are not among the slow tests. What the others do here changes rarely."""
EVERY = [
    pytest.param(name, id=name, marks=() if name == QUICK else pytest.mark.slow)
    for name in SAMPLERS
]
ONE_WORKER = "workers.engine=inline"
BRANCHES = (
    "hydra.sweeper.study_name=branches",
    "++hydra.sweeper.params={training.learning_rate: 'tag(log, interval(3e-4, 3e-2))', "
    "adapter.use_dora: {true: {adapter.r: 'choice(4, 8, 16)'}, false: {adapter.r: 'choice(16, 32)'}}}",
)


def _run(
    folder: Path,
    sampler: str,
    n_trials: int,
    *overrides: str,
    space: tuple[str, ...] = FLAT,
    workers: str = ONE_WORKER,
) -> ArmResult:
    texts = [*FAKE, *space, *SAMPLERS[sampler], f"output_dir={folder}", workers, *overrides]
    (plan,) = studies([*texts, f"hydra.sweeper.n_trials={n_trials}"])
    (arm,) = run_study(plan).arms
    return arm


def _table(folder: Path) -> list[tuple[int, Any, str]]:
    """Return place, parameters and end of each trial of a study."""
    storage = f"sqlite:///{folder / 'lr_rank_sweep' / 'study.db'}"
    trials = optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials
    return [(turn_of(each).place, each.params, each.user_attrs["cause"]) for each in trials]


def test_every_sampler_is_among_them() -> None:
    """A new name of sampler= is held to this contract too."""
    named = {text for overrides in SAMPLERS.values() for text in overrides}
    assert {f"sampler={name}" for name in get_args(SamplerName)} <= named


@pytest.mark.parametrize("sampler", EVERY)
def test_a_study_that_is_extended_has_the_trials_of_a_longer_one(
    sampler: str, tmp_path: Path
) -> None:
    """Five trials and then eight, in two runs, are the eight of one run."""
    _run(tmp_path / "twice", sampler, 5)
    _run(tmp_path / "twice", sampler, 8)
    _run(tmp_path / "once", sampler, 8)
    tables = [_table(tmp_path / each) for each in ("once", "twice")]
    assert len(tables[0]) >= 8
    assert tables[0] == tables[1]


@pytest.mark.parametrize("sampler", EVERY)
@pytest.mark.parametrize("n_jobs", [1, 4])
def test_the_number_of_workers_is_free(
    sampler: str, n_jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The total is reached, and every point lies inside the space."""
    monkeypatch.setattr(study_run, "open_engine", opener(lambda key: 0.0))
    arm = _run(tmp_path, sampler, 10, workers=f"hydra.sweeper.n_jobs={n_jobs}")
    finished = [trial for trial in arm.trials if trial.outcome.cause == "finished"]
    assert len(finished) == 10
    assert all(trial.params["adapter.r"] in (2, 4, 8, 16, 32) for trial in finished)


@pytest.mark.parametrize("sampler", [each for each in EVERY if each.id != "grid"])
def test_branches_are_searched_by_every_sampler(
    sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keys are those of the drawn branch. A sampler that cannot model them says which one does."""
    arm = _run(tmp_path, sampler, 9, space=BRANCHES)
    pairs = {(each.params["adapter.use_dora"], each.params["adapter.r"]) for each in arm.trials}
    assert pairs <= {(True, 4), (True, 8), (True, 16), (False, 16), (False, 32)}
    printed = " ".join(capsys.readouterr().out.split())
    said = "sampler tpe chooses the points: this space has branches" in printed
    assert said == (sampler == "lora")


@pytest.mark.parametrize("sampler", EVERY)
def test_one_trial_is_a_study(sampler: str, tmp_path: Path) -> None:
    """It ends with its answer."""
    arm = _run(tmp_path, sampler, 1)
    assert arm.best is not None
    assert len(arm.trials) == 1


@pytest.mark.parametrize("sampler", EVERY)
def test_a_space_without_a_possible_point_ends(sampler: str, tmp_path: Path) -> None:
    """Nothing fits into memory: no answer, no error, and no endless search."""
    arm = _run(tmp_path, sampler, 4, "workers.fake.room_mib=0.001")
    assert arm.best is None
    assert {trial.outcome.cause for trial in arm.trials} <= {"oom", "refused"}
    assert 4 <= len(arm.trials) <= 12


@pytest.mark.parametrize("sampler", EVERY)
def test_several_objectives_are_searched_by_every_sampler(sampler: str, tmp_path: Path) -> None:
    """Fewer parameters against a lower loss: six trials end."""
    arm = _run(tmp_path, sampler, 6, "hydra.sweeper.costs=[parameters/trainable]")
    assert sum(trial.outcome.cause == "finished" for trial in arm.trials) == 6
