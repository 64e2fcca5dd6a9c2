"""What `sweeper clean` deletes, and what it never does."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from sweeper.nightly.retention import removals, remove

from sweeper.errors import StudyError, StudyLocked
from sweeper.folders import StudyFolder
from sweeper.reporting.results import load_results
from sweeper.search.plan import studies
from sweeper.session import run_study

NAME = "lr_rank_sweep"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four adapters and one full fine-tune, by the trainer that only pretends."""
    folder = tmp_path_factory.mktemp("outputs")
    fake = ["workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0"]
    short = ["hydra.sweeper.n_trials=4", "hydra.sweeper.arms.full.n_trials=1", "tracking=none"]
    (plan,) = studies([f"+experiment={NAME}", f"output_dir={folder}", *fake, *short])
    run_study(plan)
    return folder


@pytest.fixture
def study(output_dir: Path) -> StudyFolder:
    """The study with weights beside its figures."""
    study = StudyFolder(output_dir / NAME)
    for number in range(4):
        adapter = study.trial("lora", number).adapter
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
    model = study.trial("full", 0).model
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(b"0" * 2**21)
    return study


def _ranked(output_dir: Path) -> list[int]:
    return [trial.number for trial in load_results(NAME, output_dir).arms[0].trials]


def test_best_adapters_stay_and_losers_go(study: StudyFolder, output_dir: Path) -> None:
    """keep 2 of 4: the two worst adapters and the full weights go, with their sizes."""
    found = removals(NAME, output_dir, 2)
    losers = [study.trial("lora", number).adapter for number in _ranked(output_dir)[2:]]
    assert {each.path for each in found} == {*losers, study.trial("full", 0).model}
    assert sum(each.mib for each in found) == pytest.approx(4.0)


def test_nothing_but_weights_is_removed(study: StudyFolder, output_dir: Path) -> None:
    """After a cleaning every file that is no weight is where it was, and cleaning again does nothing."""
    before = {path for path in study.path.rglob("*") if path.suffix != ".safetensors"}
    before -= {study.trial("lora", number).adapter for number in range(4)}
    before -= {study.trial("full", 0).model}
    remove(NAME, output_dir, removals(NAME, output_dir, 0))
    assert before <= set(study.path.rglob("*"))
    assert not list(study.path.rglob("*.safetensors"))
    assert removals(NAME, output_dir, 0) == []


def test_champions_stay_whatever_their_rank(study: StudyFolder, output_dir: Path) -> None:
    """The adapter that a registry points at is no loser."""
    worst = study.trial("lora", _ranked(output_dir)[-1])
    found = removals(NAME, output_dir, 0, [worst.path])
    assert worst.adapter not in {each.path for each in found}
    assert len(found) == 4


def test_checkpoints_that_can_be_resumed_stay(study: StudyFolder, output_dir: Path) -> None:
    """A trial without an outcome may go on; nothing of it is touched."""
    open_trial = study.trial("lora", 7)
    open_trial.checkpoints.mkdir(parents=True, exist_ok=True)
    open_trial.adapter.mkdir(exist_ok=True)
    assert not any(open_trial.path in each.path.parents for each in removals(NAME, output_dir, 0))


def test_running_study_is_not_cleaned(study: StudyFolder, output_dir: Path) -> None:
    """While a driver holds the lock, nothing is deleted."""
    found = removals(NAME, output_dir, 0)
    with FileLock(study.lock), pytest.raises(StudyLocked):
        remove(NAME, output_dir, found)
    assert all(each.path.exists() for each in found)


def test_unknown_study_is_an_error(output_dir: Path) -> None:
    """The studies that exist are named."""
    with pytest.raises(StudyError, match=NAME):
        removals("nope", output_dir, 1)
