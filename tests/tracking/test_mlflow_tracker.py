"""The tracker against a real MLflow store, read back by MLflow's own client."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source
from mlflow.entities import Dataset
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from sweeper.folders import TrialFolder
from sweeper.settings import Objective
from sweeper.tracking import mlflow_tracker
from sweeper.tracking.mlflow_tracker import MlflowTracker, local_uri
from sweeper.tracking.tracker import (
    RUN_PARAMS,
    DatasetRecord,
    ModelRecord,
    StudyEnd,
    StudyRecord,
    TrialRecord,
    run_params,
)
from tests.conftest import make_settings

LOSS = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)
STUDY = StudyRecord("lr_rank_sweep", "mine", {"lora.n_trials": 2}, {"git.commit": "abc"}, LOSS)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    root = tmp_path_factory.mktemp("store")
    MlflowClient(local_uri(root)).search_experiments()
    return root / "mlflow.db"


@pytest.fixture(autouse=True)
def database(empty_store: Path, tmp_path: Path) -> None:
    """Every test's own copy of it."""
    shutil.copy(empty_store, tmp_path)


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
    tracker.close_study(StudyEnd("FINISHED", {"best/eval_loss": 2.0}, note="# the answer"))
    return tracker.close()


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


DATA = DatasetRecord("rows.jsonl", "d" * 64, ("rows.jsonl",), {"rows": {"train": 32}})
BEST = {"trial": "lora/0000", "adapter.r": 8}


def _conclude(root: Path, trial: TrialRecord, registered: str | None = None) -> list[str]:
    """A study of one trial to its end, with its adapter as a model."""
    tracker = MlflowTracker(None, root, registered)
    tracker.open_study(STUDY)
    trial = replace(trial, dataset=DATA)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0, "cost/seconds": 9.0}, {})
    model = ModelRecord(trial.key, trial.folder.adapter, 2, {"adapter.r": 8})
    (root / "figures").mkdir(exist_ok=True)
    (root / "figures" / "curves.svg").write_text("<svg/>")
    end = StudyEnd(
        "FINISHED",
        {"best/eval_loss": 2.0},
        BEST,
        "# the answer",
        [root / "figures"],
        DATA,
        [model],
    )
    tracker.close_study(end)
    return tracker.close()


def test_the_best_adapter_is_a_logged_model_of_its_run(tmp_path: Path, trial: TrialRecord) -> None:
    """Its files, its parameters, what it is worth, and the run it came from; once, if told again."""
    for _ in range(2):
        assert _conclude(tmp_path, trial) == []
    client = MlflowClient(local_uri(tmp_path))
    experiment = client.get_experiment_by_name("lr_rank_sweep").experiment_id
    (model,) = client.search_logged_models([experiment])
    child = next(run for run in _runs(tmp_path) if run.info.run_name == "lora/0000")
    assert (model.name, model.source_run_id) == ("mine-lora-0000", child.info.run_id)
    assert str(model.status) == "READY"
    assert model.params == {"adapter.r": "8"}
    assert [(metric.key, metric.value) for metric in model.metrics] == [("best/eval_loss", 2.0)]
    assert [output.model_id for output in child.outputs.model_outputs] == [model.model_id]
    files = Path(model.artifact_location.removeprefix("file://"))
    assert [path.name for path in files.iterdir()] == ["adapter_config.json"]
    assert len(client.get_metric_history(child.info.run_id, "best/eval_loss")) == 1


def test_a_model_cut_short_is_sent_again(tmp_path: Path, trial: TrialRecord) -> None:
    """A driver killed while it sent the files leaves no half model behind."""
    assert _record(tmp_path, trial) == []
    client = MlflowClient(local_uri(tmp_path))
    experiment = client.get_experiment_by_name("lr_rank_sweep").experiment_id
    tags = {"sweeper.study": "mine", "sweeper.trial": "lora/0000"}
    client.create_logged_model(experiment, name="mine-lora-0000", tags=tags)
    assert _conclude(tmp_path, trial) == []
    (model,) = client.search_logged_models([experiment])
    assert str(model.status) == "READY"


def test_runs_name_their_data_as_inputs(tmp_path: Path, trial: TrialRecord) -> None:
    """Trial and study: the same dataset, its digest as long as MLflow takes it."""
    assert _conclude(tmp_path, trial) == []
    for run in _runs(tmp_path):
        (given,) = run.inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("rows.jsonl", "d" * 36)
        assert json.loads(given.dataset.profile)["rows"] == {"train": 32}
        assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


@pytest.mark.parametrize(
    ("paths", "kind"),
    [
        (("embedded",), "code"),
        (("https://example.org/rows.jsonl",), "http"),
        (("openai/gsm8k",), "hugging_face"),
        (("a.jsonl", "b.jsonl"), "external"),
    ],
)
def test_sources_are_of_mlflows_kinds(paths: tuple[str, ...], kind: str) -> None:
    """mlflow.data reads them back, but for a mixture, which it has no word for."""
    found, source = mlflow_tracker._dataset_source(paths)
    assert found == kind
    if kind != "external":
        entity = Dataset("d", "1", found, json.dumps(source))
        assert get_source(entity)._get_source_type() == kind


def test_the_parent_run_tells_the_answer(tmp_path: Path, trial: TrialRecord) -> None:
    """Its best trial with parameters and metrics, the pictures, and where it comes from."""
    assert _conclude(tmp_path, trial) == []
    client = MlflowClient(local_uri(tmp_path))
    parent = next(run for run in _runs(tmp_path) if run.info.run_name == "mine")
    tags = parent.data.tags
    assert (tags["best.trial"], tags["best.adapter.r"]) == ("lora/0000", "8")
    assert parent.data.metrics["best/eval_loss"] == 2.0
    assert tags["mlflow.source.type"] == "LOCAL"
    assert "mlflow.source.git.commit" not in tags  # "abc" is no commit
    paths = [item.path for item in client.list_artifacts(parent.info.run_id, "figures")]
    assert paths == ["figures/curves.svg"]


def test_an_experiment_that_somebody_made_gets_what_it_lacks(
    tmp_path: Path, trial: TrialRecord
) -> None:
    """Its primary metric is set; a kind that was chosen stays."""
    client = MlflowClient(local_uri(tmp_path))
    location = (tmp_path / "elsewhere").as_uri()
    kind = {"mlflow.experimentKind": "chosen"}
    client.create_experiment("lr_rank_sweep", artifact_location=location, tags=kind)
    assert _record(tmp_path, trial) == []
    tags = client.get_experiment_by_name("lr_rank_sweep").tags
    assert tags["mlflow.experimentKind"] == "chosen"
    assert tags["mlflow.experiment.primaryMetric.name"] == "best/eval_loss"


def test_a_study_registers_its_best_adapter_once(tmp_path: Path, trial: TrialRecord) -> None:
    """On request; the same command again makes no second version."""
    for _ in range(2):
        assert _conclude(tmp_path, trial, registered="mine") == []
    client = MlflowClient(local_uri(tmp_path))
    (version,) = client.search_model_versions("name = 'mine'")
    assert version.tags == {"sweeper.study": "mine", "sweeper.trial": "lora/0000"}
    child = next(run for run in _runs(tmp_path) if run.info.run_name == "lora/0000")
    assert version.run_id == child.info.run_id


def test_a_long_description_ends_with_a_line() -> None:
    """No row of a table is cut in two."""
    rows = "\n".join(f"| {number} | {'x' * 50} |" for number in range(1000))
    note = mlflow_tracker._cut(rows)
    assert 7900 < len(note) <= 8000
    assert note.endswith(" |")


def test_parameters_are_few_and_stable() -> None:
    """The same names in every run of a method, and whatever else was searched."""
    settings = make_settings().trial
    names = set(run_params(settings, {}))
    assert names <= set(RUN_PARAMS)
    assert len(names) < 30
    searched = run_params(settings, {"training.max_grad_norm": 1.0, "quantization": "nf4"})
    assert set(searched) - names == {"training.max_grad_norm", "quantization"}
    full = run_params(make_settings("adapter=none", "quantization=none").trial, {})
    assert {"model.base_model", "training.learning_rate", "seed"} <= set(full) < names | {"x"}
