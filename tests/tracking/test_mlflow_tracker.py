"""The tracker against a real MLflow store, read back by MLflow's own client."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from sweeper.config.settings import Objective
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import TrialFolder
from sweeper.tracking import mlflow_tracker
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.tracker import StudyRecord, TrialRecord
from sweeper.tracking.tracking_ledger import TrackingLedger, count_pending
from sweeper.tracking.tracking_server import TrackingServer, local_uri

LOSS = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)
STUDY = StudyRecord("lr_rank_sweep", "mine", {"lora.n_trials": 2}, {"git.commit": "abc"}, LOSS)
NOWHERE = "http://127.0.0.1:9"
Observe = Callable[..., None]


@pytest.fixture
def trial(tmp_path: Path, empty_store: Path) -> TrialRecord:
    """A trial folder with two evaluations and an adapter, and an empty store."""
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns")
    return make_trial(tmp_path)


def make_trial(tmp_path: Path) -> TrialRecord:
    """A trial folder with two evaluations and an adapter."""
    folder = TrialFolder(tmp_path / "mine" / "lora" / "trial_0000")
    folder.adapter.mkdir(parents=True)
    (folder.adapter / "adapter_config.json").write_text("{}")
    (folder.adapter / "z_last_by_name.txt").write_text("weights")
    write_manifest(folder.adapter)
    _observe(folder, 1, 2)
    folder.outcome.write_text("{}")
    return TrialRecord("lora/0000", folder, {"training.learning_rate": 0.001}, {"arm": "lora"})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a server that is away."""
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(mlflow_tracker, "CLOSE_SECONDS", 0.2)


def _observe(folder: TrialFolder, *steps: int, value: float = 4.0) -> None:
    with folder.metrics.open("a") as file:
        for step in steps:
            line = {"step": step, "time": 1_700_000_000 + step, "eval/loss": value - step}
            file.write(json.dumps(line) + "\n")


def _tracker(folder: Path, uri: str | None = None) -> MlflowTracker:
    return MlflowTracker(TrackingServer(uri, folder / "mlruns"), folder / "mine" / ".tracking")


def _client(folder: Path) -> MlflowClient:
    return MlflowClient(local_uri(folder / "mlruns"))


def _runs(folder: Path) -> list[Any]:
    client = _client(folder)
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    return list(client.search_runs([experiment.experiment_id]))


def _child(folder: Path) -> Any:
    (child,) = (run for run in _runs(folder) if run.info.run_name == "lora/0000")
    return child


def _history(folder: Path, name: str = "eval/loss") -> list[tuple[int, float]]:
    points = _client(folder).get_metric_history(_child(folder).info.run_id, name)
    return [(point.step, point.value) for point in points]


def _record(folder: Path, trial: TrialRecord, uri: str | None = None) -> list[str]:
    tracker = _tracker(folder, uri)
    tracker.open_study(STUDY)
    tracker.start(trial)
    tracker.ship(trial)
    tracker.ship(trial)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0}, {"cause": "finished"})
    tracker.keep([trial.folder])
    tracker.close_study("FINISHED", {"best/eval_loss": 2.0}, {}, "# the answer", [])
    return tracker.close()


def test_figures_of_later_are_added_once(tmp_path: Path, trial: TrialRecord) -> None:
    """Measured after the run's end and sent by two sessions: one point."""
    assert _record(tmp_path, trial) == []
    for _ in range(2):
        tracker = _tracker(tmp_path)
        tracker.open_study(STUDY)
        tracker.amend(trial, {"general/forgetting": 0.02}, 1_700_000_000.5)
        tracker.close_study("FINISHED", {}, {}, "", [])
        assert tracker.close() == []
    child, _ = sorted(_runs(tmp_path), key=lambda run: run.info.run_name)
    client = _client(tmp_path)
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
    client = _client(tmp_path)
    tags = client.get_experiment(parent.info.experiment_id).tags
    assert tags["mlflow.experiment.primaryMetric.name"] == "best/eval_loss"
    assert tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "false"
    history = client.get_metric_history(child.info.run_id, "eval/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0)]
    assert [point.timestamp for point in history] == [1_700_000_001_000, 1_700_000_002_000]
    paths = {item.path for item in client.list_artifacts(child.info.run_id)}
    assert {"adapter", "outcome.json"} <= paths
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert (model.status.name, model.source_run_id) == ("READY", child.info.run_id)
    assert parent.data.tags["mlflow.note.content"] == "# the answer"


def test_recording_again_changes_nothing(
    tmp_path: Path, trial: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart the same runs go on: no second run, no second point."""
    _record(tmp_path, trial)
    before = {run.info.run_id: run.data.metrics for run in _runs(tmp_path)}
    sent: list[str] = []
    log_batch = MlflowClient.log_batch

    def watched(client: MlflowClient, run: str, metrics: Any = (), **more: Any) -> Any:
        sent.extend(metric.key for metric in metrics)
        return log_batch(client, run, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", watched)
    _record(tmp_path, trial)
    assert sent == [], "SQLite drops a point that it has, other stores keep both"
    assert {run.info.run_id: run.data.metrics for run in _runs(tmp_path)} == before
    assert len(_history(tmp_path)) == 2
    assert len(_history(tmp_path, "best/eval_loss")) == 1


def test_another_study_of_the_same_name_has_its_own_runs(
    tmp_path: Path, trial: TrialRecord
) -> None:
    """Two people share a server: their studies of one name do not continue each other's runs."""
    _record(tmp_path, trial)
    (tmp_path / "mine" / ".tracking").rename(tmp_path / "theirs")
    assert _record(tmp_path, trial) == []
    assert len(_runs(tmp_path)) == 4


def test_an_unreachable_server_blocks_no_call_and_is_counted(
    tmp_path: Path, trial: TrialRecord, impatient: None
) -> None:
    """Every call returns at once; what could not be recorded is counted at the end."""
    tracker = _tracker(tmp_path, NOWHERE)
    started = time.monotonic()
    tracker.open_study(STUDY)
    for _ in range(20):
        tracker.start(trial)
        tracker.ship(trial)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0}, {})
    assert time.monotonic() - started < 5
    (problem,) = tracker.close()
    assert problem.startswith("3 metric points, 1 file and 1 final state of 2 runs (http://127")
    assert "Connection" in problem


@pytest.mark.usefixtures("impatient")
def test_the_next_process_ships_what_was_left(tmp_path: Path, trial: TrialRecord) -> None:
    """MLflow was away for a whole study; a later process, told nothing, records it all."""
    assert _record(tmp_path, trial, NOWHERE) != []
    later = TrackingLedger(tmp_path / "mine" / ".tracking")
    assert count_pending(later, TrackingServer(None, tmp_path / "mlruns").name).points == 4
    assert _tracker(tmp_path).close() == []
    child, parent = sorted(_runs(tmp_path), key=lambda run: run.info.run_name)
    assert child.info.status == parent.info.status == "FINISHED"
    assert _history(tmp_path) == [(1, 3.0), (2, 2.0)]
    assert child.info.end_time < time.time() * 1000


class Lossy:
    """A client whose log_batch is carried out and then loses its answer, once."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, run_id: str, **batch: Any) -> None:
        """Stored; but the first answer with metrics never arrives."""
        self._client.log_batch(run_id, **batch)
        if batch.get("metrics") and not self.lost:
            self.lost += 1
            raise MlflowException("API request failed with exception: connection reset")


def test_a_lost_answer_doubles_no_point(
    tmp_path: Path, trial: TrialRecord, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store took although its answer was lost is asked for, and not sent again.

    MLflow's SQL store drops a point that it has; older file stores do not, so the requests count.
    """
    lossy = Lossy(_client(tmp_path))
    sent: list[list[Any]] = []

    def counting(run_id: str, **batch: Any) -> None:
        sent.append(list(batch.get("metrics", ())))
        Lossy.log_batch(lossy, run_id, **batch)

    monkeypatch.setattr(lossy, "log_batch", counting, raising=False)
    monkeypatch.setattr(TrackingServer, "client", lambda _: lossy)
    assert _record(tmp_path, trial) == []
    assert lossy.lost == 1
    points = [(point.key, point.step) for batch in sent for point in batch]
    assert points.count(("eval/loss", 1)) == points.count(("eval/loss", 2)) == 1
    assert _history(tmp_path) == [(1, 3.0), (2, 2.0)]


def test_a_new_attempt_sends_no_step_twice(tmp_path: Path, trial: TrialRecord) -> None:
    """A killed attempt's steps after its checkpoint are measured again: one point a step."""
    tracker = _tracker(tmp_path)
    tracker.open_study(STUDY)
    tracker.start(trial)
    assert tracker.close() == []
    trial.folder.metrics.unlink()
    _observe(trial.folder, 1)
    _observe(trial.folder, 2, 3, value=4.01)
    assert _record(tmp_path, trial) == []
    assert _history(tmp_path) == [(1, 3.0), (2, 2.0), (3, pytest.approx(1.01))]


class Making:
    """A client whose create_run is carried out and then loses its answer, once."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_run(self, *arguments: Any, **options: Any) -> Any:
        """Made; but the first answer never arrives."""
        run = self._client.create_run(*arguments, **options)
        self.made.append(run.info.run_id)
        if len(self.made) == 1:
            raise MlflowException("API request failed with exception: timed out")
        return run


def test_a_run_whose_answer_was_lost_is_found(
    tmp_path: Path, trial: TrialRecord, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for by its tags before another is made: one parent, one child."""
    making = Making(_client(tmp_path))
    monkeypatch.setattr(TrackingServer, "client", lambda _: making)
    assert _record(tmp_path, trial) == []
    assert len(making.made) == len(_runs(tmp_path)) == 2


def test_a_wiped_store_gets_everything_anew(tmp_path: Path, trial: TrialRecord) -> None:
    """The marks speak of runs that the store no longer has."""
    _record(tmp_path, trial)
    client = _client(tmp_path)
    for run in _runs(tmp_path):
        client.delete_run(run.info.run_id)
    for path in (tmp_path / "mine" / ".tracking" / "shipped").rglob("*.json"):
        path.write_text(path.read_text().replace('"run":"', '"run":"0'))
    _observe(trial.folder, 3)
    tracker = _tracker(tmp_path)
    tracker.start(trial)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 1.0}, {"cause": "finished"})
    assert tracker.close() == []
    assert _history(tmp_path) == [(1, 3.0), (2, 2.0), (3, 1.0)]


class Refusing:
    """A client that takes no params."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, run_id: str, **batch: Any) -> None:
        """Refuse params, with a password in the message."""
        if batch.get("params"):
            raise MlflowException("no, http://me:geheim@host", error_code=INVALID_PARAMETER_VALUE)
        self._client.log_batch(run_id, **batch)


def test_a_refused_part_is_said_and_keeps_no_other_back(
    tmp_path: Path, trial: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong params do not become right by trying again; points and final state are recorded."""
    refusing = Refusing(_client(tmp_path))
    monkeypatch.setattr(TrackingServer, "client", lambda _: refusing)
    (problem,) = _record(tmp_path, trial)
    assert "params: no, http://me:***@host" in problem
    assert _history(tmp_path) == [(1, 3.0), (2, 2.0)]
    assert _child(tmp_path).info.status == "FINISHED"


def test_a_torn_line_is_left_for_the_next_shipment(tmp_path: Path, trial: TrialRecord) -> None:
    """A line that is still being written is not read."""
    with trial.folder.metrics.open("a") as file:
        file.write('{"step": 3, "ti')
    assert _record(tmp_path, trial) == []
    assert len(_history(tmp_path)) == 2


def test_two_processes_do_not_ship_one_study_at_once(
    tmp_path: Path, trial: TrialRecord, impatient: None
) -> None:
    """While another ships (`sweeper sync`), the tracker waits in its thread, and says so at the end."""
    folder = tmp_path / "mine" / ".tracking"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        (problem,) = _record(tmp_path, trial)
    assert "another process is shipping" in problem
    assert _tracker(tmp_path).close() == []
    assert len(_history(tmp_path)) == 2


def test_a_damaged_adapter_is_refused_and_the_manifest_comes_last(
    tmp_path: Path, trial: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader who finds the manifest finds the rest; weights that changed are not uploaded."""
    _record(tmp_path, trial)
    run = _client(tmp_path).get_run(_child(tmp_path).info.run_id)
    stored = Path(run.info.artifact_uri.removeprefix("file://")) / "adapter"
    times = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert max(times, key=lambda name: times[name]) == "manifest.json"
    (trial.folder.adapter / "z_last_by_name.txt").write_text("Weights")
    tracker = _tracker(tmp_path)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 1.0}, {})
    (problem,) = tracker.close()
    assert "z_last_by_name.txt: changed" in problem
    assert (stored / "z_last_by_name.txt").read_text() == "weights"


def test_weights_that_are_not_kept_are_not_uploaded(tmp_path: Path, trial: TrialRecord) -> None:
    """Of a loser only the figures are recorded; its adapter goes when the study ends."""
    tracker = _tracker(tmp_path)
    tracker.open_study(STUDY)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0}, {"cause": "finished"})
    tracker.keep([])
    assert tracker.close() == []
    names = {item.path for item in _client(tmp_path).list_artifacts(_child(tmp_path).info.run_id)}
    assert names == {"outcome.json"}


def test_what_begun_and_was_never_ended_is_killed_with_the_study(
    tmp_path: Path, trial: TrialRecord
) -> None:
    """A finalist's seed that a killed driver began and the next one no longer wants."""
    tracker = _tracker(tmp_path)
    tracker.open_study(STUDY)
    tracker.start(trial)
    tracker.close_study("FINISHED", {}, {}, "", [])
    assert tracker.close() == []
    assert _child(tmp_path).info.status == "KILLED"
