"""`sweeper sync`: what MLflow missed is recorded later, from the study's folder alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from sweeper.commands.run_study import run_study
from sweeper.commands.sync import sync
from sweeper.config.settings import TrackingSettings
from sweeper.core.errors import StudyError
from sweeper.search.study_plan import studies
from sweeper.tracking import mlflow_tracker
from tests.conftest import Program

NAME = "lr_rank_sweep"
FAKE = [
    *(f"+experiment={NAME}", "workers=fake", "workers.engine=inline", "pruner=none"),
    *("~hydra.sweeper.arms.full", "hydra.sweeper.n_trials=2", "finalists=none"),
]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store, and nobody who waits for one that is away."""
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(mlflow_tracker, "CLOSE_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def _study(*overrides: str) -> None:
    (plan,) = studies([*FAKE, "workers.fake.step_seconds=0.0", *overrides])
    run_study(plan)


def _sync(uri: str | None, *names: str, dry_run: bool = False) -> list[str]:
    tracking = TrackingSettings(kind="mlflow", uri=uri)
    return [str(found) for found in sync(names, Path("outputs"), tracking, dry_run=dry_run)]


def _runs(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(NAME)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len({run.info.run_name for run in runs}) == len(runs), "no run twice"
    return {run.info.run_name: run for run in runs}


def _points(uri: str, run: Any, name: str = "eval/loss") -> list[int]:
    return [point.step for point in MlflowClient(uri).get_metric_history(run.info.run_id, name)]


def test_a_study_without_mlflow_is_recorded_later_and_once(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends well and says what is missing; sync records all of it, once."""
    _study(f"tracking.uri={NOWHERE}")
    printed = capsys.readouterr().out
    assert "not recorded in MLflow: " in printed
    assert "metric points" in printed
    assert f"python -m sweeper sync {NAME}" in printed
    (counted,) = _sync(uri, dry_run=True)
    assert "metric points" in counted
    assert "3 final states of 3 runs not recorded" in counted
    assert _runs(uri) == {}
    (words,) = _sync(uri, NAME)
    assert words.startswith(f"{NAME}: recorded ")
    runs = _runs(uri)
    assert set(runs) == {NAME, "lora/0000", "lora/0001"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert _points(uri, runs["lora/0000"]) == [4, 8, 12, 16, 20]
    assert runs["lora/0000"].data.tags["mlflow.parentRunId"] == runs[NAME].info.run_id
    assert runs[NAME].data.tags["mlflow.note.content"].startswith("# ")
    assert _sync(uri) == [f"{NAME}: MLflow has everything"]
    assert _points(uri, _runs(uri)["lora/0000"]) == [4, 8, 12, 16, 20]


def test_the_next_start_of_a_study_records_its_leftovers(uri: str) -> None:
    """The same command, with MLflow back, trains nothing and records everything."""
    _study(f"tracking.uri={NOWHERE}")
    _study(f"tracking.uri={uri}")
    runs = _runs(uri)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert _points(uri, runs["lora/0001"]) == [4, 8, 12, 16, 20]


def test_without_a_uri_it_goes_to_where_the_study_went(uri: str) -> None:
    """MLFLOW_TRACKING_URI is no longer set: the server of the study is asked, no local store is made."""
    _study(f"tracking.uri={NOWHERE}")
    (words,) = _sync(None)
    assert "not recorded: " in words
    assert NOWHERE in words
    assert not Path("mlruns").exists()


def test_a_killed_study_gets_final_states(uri: str, tmp_path: Path) -> None:
    """kill -9 in the middle: what ended is FINISHED, what ran is KILLED; a resumed study goes on."""
    driver = subprocess.Popen(
        [
            *(sys.executable, "-m", "sweeper", *FAKE, "hydra.sweeper.n_trials=3", "-m"),
            *(f"tracking.uri={uri}", "workers.fake.step_seconds=0.05"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    second = tmp_path / "outputs" / NAME / "lora" / "trial_0001" / "metrics.jsonl"
    while not second.exists() or not second.read_text():
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert _sync(uri, dry_run=True)[0].endswith("1 runs of a killed driver would end")
    _sync(uri)
    states = {name: run.info.status for name, run in _runs(uri).items()}
    assert states == {NAME: "KILLED", "lora/0000": "FINISHED", "lora/0001": "KILLED"}
    _study(f"tracking.uri={uri}", "hydra.sweeper.n_trials=3")
    runs = _runs(uri)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert set(runs) == {NAME, *(f"lora/{number:04d}" for number in range(3))}
    assert all(_points(uri, runs[f"lora/{n:04d}"]) == [4, 8, 12, 16, 20] for n in range(3))


def test_a_study_that_runs_is_left_alone(uri: str) -> None:
    """It records itself; two that ship would ship twice."""
    _study(f"tracking.uri={NOWHERE}")
    with FileLock(f"outputs/{NAME}/driver.lock"):
        (words,) = _sync(uri)
    assert "runs now" in words
    assert _runs(uri) == {}


def test_unknown_and_untracked_studies_are_named(uri: str) -> None:
    """The ones that were tracked are listed; without any there is nothing to do."""
    assert _sync(uri) == []
    _study("tracking=none")
    assert _sync(uri) == []
    with pytest.raises(StudyError, match="nothing was tracked there"):
        _sync(uri, NAME)


def test_the_verb_says_what_is_left_by_its_exit_code(uri: str, in_process: Program) -> None:
    """0: MLflow has everything; 1: something is left; 2: a wrong setting."""
    _study(f"tracking.uri={NOWHERE}")

    def exit_code(*words: str) -> int:
        return in_process("sync", *words).returncode

    assert exit_code("tracking.uri=17=x", "nonsense=1") == 2
    assert exit_code(NAME, "--dry-run") == 0
    assert exit_code("nope") == 1
    assert exit_code(NAME, f"tracking.uri={uri}") == 0
