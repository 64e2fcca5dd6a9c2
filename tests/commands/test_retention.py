"""What `sweeper clean` deletes, and what it never does."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from sweeper.commands.retention import Removal, removals, remove
from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyLocked
from sweeper.core.outcome import Cause, Outcome
from sweeper.core.paths import StudyFolder
from sweeper.reporting.results import load_results
from sweeper.search.study_plan import StudyPlan, studies

NAME = "lr_rank_sweep"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four adapters and two full fine-tune, by the trainer that only pretends."""
    folder = tmp_path_factory.mktemp("outputs")
    run_study(_plan(folder))
    return folder


def _plan(output_dir: Path, *overrides: str) -> StudyPlan:
    fake = ["workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0"]
    short = ["hydra.sweeper.n_trials=4", "hydra.sweeper.arms.full.n_trials=2", "tracking=none"]
    given = [f"+experiment={NAME}", f"output_dir={output_dir}", "pruner=none"]
    (plan,) = studies([*given, *fake, *short, *overrides])
    return plan


@pytest.fixture
def study(output_dir: Path) -> StudyFolder:
    """The study with weights beside its figures."""
    study = StudyFolder(output_dir / NAME)
    for number in range(4):
        adapter = study.trial("lora", number).adapter
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
    for number in range(2):
        model = study.trial("full", number).model
        model.mkdir(exist_ok=True)
        (model / "model.safetensors").write_bytes(b"0" * 2**21)
    return study


def _ranked(output_dir: Path, arm: int = 0) -> list[int]:
    return [trial.number for trial in load_results(NAME, output_dir).arms[arm].trials]


def _removals(study: StudyFolder, adapters: int, *champions: Path) -> list[Removal]:
    return removals(NAME, study.path.parent, adapters, champions)


def test_best_adapters_stay_and_losers_go(study: StudyFolder, output_dir: Path) -> None:
    """Keep 2 of 4: the two worst adapters and the worse full weights go, with their sizes."""
    found = _removals(study, 2)
    losers = [study.trial("lora", number).adapter for number in _ranked(output_dir)[2:]]
    worse = study.trial("full", _ranked(output_dir, 1)[1]).model
    assert {each.path for each in found} == {*losers, worse}
    assert sum(each.mib for each in found) == pytest.approx(4.0)


def test_what_the_report_points_to_stays(study: StudyFolder, output_dir: Path) -> None:
    """Even with none to keep: each arm's best, its finalists and their seeds, and a fork's trial."""
    lora, full = _ranked(output_dir), _ranked(output_dir, 1)
    seed = study.finalist("lora", lora[0], 1).adapter
    other = study.finalist("lora", lora[3], 1).adapter
    for folder in (seed, other):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(b"0")
    fork = output_dir / "fork" / "lora" / "trial_0000"
    fork.parent.mkdir(parents=True)
    fork.symlink_to(study.trial("lora", lora[2]).path)
    gone = {each.path for each in _removals(study, 0)}
    losers = {study.trial("lora", lora[place]).adapter for place in (1, 3)}
    assert gone == {*losers, other, study.trial("full", full[1]).model}
    fork.unlink()


def test_nothing_but_weights_is_removed(study: StudyFolder) -> None:
    """After a cleaning every file that is no weight is where it was; cleaning again does nothing."""
    before = {path for path in study.path.rglob("*") if path.is_file()}
    before -= {path for path in before if path.suffix == ".safetensors"}
    found = _removals(study, 0)
    assert found
    remove(NAME, study.path.parent, found)
    assert before <= set(study.path.rglob("*"))
    assert not any(each.path.exists() for each in found)
    assert _removals(study, 0) == []


def test_champions_stay_whatever_their_rank(study: StudyFolder, output_dir: Path) -> None:
    """The adapter that a registry points at is no loser."""
    worst = study.trial("lora", _ranked(output_dir)[-1])
    assert worst.adapter in {each.path for each in _removals(study, 0)}
    assert worst.adapter not in {each.path for each in _removals(study, 0, worst.path)}


def test_checkpoints_that_can_be_resumed_stay(study: StudyFolder) -> None:
    """A trial without an outcome may go on, a cancelled one will; nothing of them is touched."""
    causes: dict[int, Cause | None] = {7: None, 8: "cancelled", 9: "crash"}
    for number, cause in causes.items():
        trial = study.trial("lora", number)
        trial.checkpoints.mkdir(parents=True, exist_ok=True)
        if cause is not None:
            trial.outcome.write_text(Outcome(cause=cause).model_dump_json())
    gone = {each.path for each in _removals(study, 0)}
    assert study.trial("lora", 9).checkpoints in gone
    assert not {study.trial("lora", number).checkpoints for number in (7, 8)} & gone


def test_running_study_is_not_cleaned(study: StudyFolder) -> None:
    """While a driver holds the lock, nothing is deleted."""
    found = _removals(study, 0)
    with FileLock(study.lock), pytest.raises(StudyLocked):
        remove(study.path.name, study.path.parent, found)
    assert all(each.path.exists() for each in found)


def test_a_study_cleans_up_when_it_ends(
    output_dir: Path, study: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again, which trains nothing: losers' weights go, and the disk's use is said."""
    loser = study.trial("lora", _ranked(output_dir)[3]).adapter
    assert loser.exists()
    run_study(_plan(output_dir, "hydra.sweeper.retention.adapters=null"))
    assert loser.exists()
    capsys.readouterr()
    run_study(_plan(output_dir, "hydra.sweeper.retention.adapters=2"))
    printed = capsys.readouterr().out
    assert not loser.exists()
    assert "losers' weights freed (retention.adapters=2)" in printed
    assert "Disk       " in printed
