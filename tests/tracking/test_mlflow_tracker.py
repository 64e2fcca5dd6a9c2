"""The tracker against a real MLflow store, read back by MLflow's own client."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from sweeper.folders import TrialFolder
from sweeper.settings import Objective
from sweeper.tracking import mlflow_tracker
from sweeper.tracking.mlflow_tracker import MlflowTracker, local_uri
from sweeper.tracking.tracker import StudyRecord, TrialRecord

LOSS = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)
STUDY = StudyRecord("lr_rank_sweep", "mine", {"lora.n_trials": 2}, {"git.commit": "abc"}, LOSS)


@pytest.fixture
def trial(tmp_path: Path) -> TrialRecord:
    """A trial folder with two evaluations and an adapter."""
    folder = TrialFolder(tmp_path / "lora" / "trial_0000")
    folder.adapter.mkdir(parents=True)
    (folder.adapter / "adapter_config.json").write_text("{}")
    lines = [
        {"step": step, "time": 1_700_000_000 + step, "eval/loss": 4.0 - step} for step in (1, 2)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.outcome.write_text("{}")
    return TrialRecord("lora/0000", folder, {"training.learning_rate": 0.001}, {"arm": "lora"})


def _runs(root: Path) -> list:  # type: ignore[type-arg]
    client = MlflowClient(local_uri(root))
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    return client.search_runs([experiment.experiment_id])


def _record(root: Path, trial: TrialRecord) -> list[str]:
    tracker = MlflowTracker(None, root)
    tracker.open_study(STUDY)
    tracker.start(trial)
    tracker.ship(trial)
    tracker.ship(trial)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0}, {"cause": "finished"})
    tracker.close_study("FINISHED", {"best/eval_loss": 2.0}, {}, "# the answer", [])
    return tracker.close()


def test_figures_of_later_are_added_once(tmp_path: Path, trial: TrialRecord) -> None:
    """Measured after the run's end and sent by two sessions: one point; an unknown run is said."""
    assert _record(tmp_path, trial) == []
    unknown = TrialRecord("lora/0099", trial.folder, {})
    for _ in range(2):
        tracker = MlflowTracker(None, tmp_path)
        tracker.open_study(STUDY)
        tracker.amend(trial, {"general/forgetting": 0.02}, 1_700_000_000.5)
        tracker.amend(unknown, {"general/forgetting": 0.02}, 1_700_000_000.5)
        tracker.close_study("FINISHED", {}, {}, "", [])
        assert tracker.close() == ["figures of lora/0099: MLflow has no run of lora/0099"]
    child, _ = sorted(_runs(tmp_path), key=lambda run: run.info.run_name)
    client = MlflowClient(local_uri(tmp_path))
    (point,) = client.get_metric_history(child.info.run_id, "general/forgetting")
    assert (point.value, point.timestamp) == (0.02, 1_700_000_000_500)
    assert child.info.status == "FINISHED"


def test_parent_child_metrics_and_artifacts(tmp_path: Path, trial: TrialRecord) -> None:
    """One parent, one child under it, every point once, the adapter stored, final states."""
    assert _record(tmp_path, trial) == []
    child, parent = sorted(_runs(tmp_path), key=lambda run: run.info.run_name)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.status == parent.info.status == "FINISHED"
    assert child.data.params == {"training.learning_rate": "0.001"}
    assert child.data.metrics["best/eval_loss"] == 2.0
    client = MlflowClient(local_uri(tmp_path))
    tags = client.get_experiment(parent.info.experiment_id).tags
    assert tags["mlflow.experiment.primaryMetric.name"] == "best/eval_loss"
    assert tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "false"
    history = client.get_metric_history(child.info.run_id, "eval/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0)]
    assert [point.timestamp for point in history] == [1_700_000_001_000, 1_700_000_002_000]
    paths = {item.path for item in client.list_artifacts(child.info.run_id)}
    assert {"adapter", "outcome.json"} <= paths
    assert parent.data.tags["mlflow.note.content"] == "# the answer"


def test_recording_again_changes_nothing(tmp_path: Path, trial: TrialRecord) -> None:
    """After a restart the same runs are found by their tags: no second run, no second point."""
    _record(tmp_path, trial)
    before = {run.info.run_id: run.data.metrics for run in _runs(tmp_path)}
    _record(tmp_path, trial)
    assert {run.info.run_id: run.data.metrics for run in _runs(tmp_path)} == before
    client = MlflowClient(local_uri(tmp_path))
    child = next(run for run in _runs(tmp_path) if run.info.run_name == "lora/0000")
    assert len(client.get_metric_history(child.info.run_id, "eval/loss")) == 2


def test_an_unreachable_server_stops_nothing_and_is_said(
    tmp_path: Path, trial: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call returns at once; what could not be recorded comes back at the end."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)  # the tracker's own settings are what is tested
    tracker = MlflowTracker("http://127.0.0.1:9", tmp_path)
    started = time.monotonic()
    tracker.open_study(STUDY)
    for _ in range(20):
        tracker.start(trial)
    tracker.end(trial, "FINISHED", {}, {})
    assert time.monotonic() - started < 1
    problems = tracker.close()
    assert time.monotonic() - started < 60
    assert any(problem.startswith("study mine") for problem in problems)
    assert any(problem.endswith("the server is away") for problem in problems)


def test_a_server_that_comes_back_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four failures, then an answer: in order, and nothing to report."""
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", (0.01,))
    tracker = MlflowTracker("http://127.0.0.1:9", tmp_path)
    done: list[str] = []

    def flaky(_: MlflowClient) -> None:
        done.append("first")
        if len(done) < 5:
            raise MlflowException("API request failed with exception: connection refused")

    tracker._later("first", flaky)
    tracker._later("second", lambda _: done.append("second"))
    assert tracker.close() == []
    assert done == ["first"] * 5 + ["second"]


def test_what_the_server_refuses_is_said_once(tmp_path: Path) -> None:
    """A wrong value does not become right by trying again; a password in the message is hidden."""
    tracker = MlflowTracker("http://127.0.0.1:9", tmp_path)
    tries: list[int] = []

    def refused(_: MlflowClient) -> None:
        tries.append(1)
        raise MlflowException("no, http://me:geheim@host", error_code=INVALID_PARAMETER_VALUE)

    tracker._later("params", refused)
    assert tracker.close() == ["params: no, http://me:***@host"]
    assert len(tries) == 1


def test_a_torn_line_is_left_for_the_next_shipment(tmp_path: Path, trial: TrialRecord) -> None:
    """A line that is still being written is not read."""
    with trial.folder.metrics.open("a") as file:
        file.write('{"step": 3, "ti')
    assert _record(tmp_path, trial) == []
