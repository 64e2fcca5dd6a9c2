"""What MLflow's own pages show: data, models, pictures, sources; a few parameters under stable names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.data import get_source
from mlflow.entities import Dataset

from sweeper.driver.trial_sizes import recorded
from sweeper.tracking.run_pages import dataset_source, source_tags
from sweeper.tracking.tracker import RUN_PARAMS, DatasetRecord, TrialRecord
from sweeper.tracking.tracking_ledger import NOTE_LENGTH, study_ending
from tests.conftest import make_settings
from tests.tracking.test_mlflow_tracker import STUDY, _child, _client, _runs, _tracker, make_trial

DATA = DatasetRecord(
    name="rows.jsonl", digest="d" * 64, sources=("rows.jsonl",), profile={"rows": {"train": 32}}
)


@pytest.fixture
def concluded(tmp_path: Path, empty_store: Path) -> Path:
    """A study of one trial to its end, twice: the second time nothing is new."""
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(empty_store.read_bytes())
    trial = make_trial(tmp_path)
    for _ in range(2):
        _conclude(tmp_path, replace(trial, dataset=DATA))
    return tmp_path


def _conclude(folder: Path, trial: TrialRecord) -> None:
    figures = folder / "mine" / "figures"
    figures.mkdir(exist_ok=True)
    (figures / "curves.svg").write_text("<svg/>")
    tracker = _tracker(folder)
    tracker.open_study(STUDY)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0, "cost/seconds": 9.0}, {})
    tracker.keep([trial.folder])
    best = {"trial": "lora/0000", "adapter.r": 8}
    tracker.close_study("FINISHED", {"best/eval_loss": 2.0}, best, "# the answer", [figures])
    assert tracker.close() == []


def _parent(folder: Path) -> Any:
    (parent,) = (run for run in _runs(folder) if run.info.run_name == "mine")
    return parent


def test_a_model_is_its_runs_output_with_its_figures(concluded: Path) -> None:
    """What it is worth stands on its own page; the run has each point once."""
    client, child = _client(concluded), _child(concluded)
    (model,) = client.search_logged_models([child.info.experiment_id])
    assert (str(model.status), model.source_run_id) == ("READY", child.info.run_id)
    assert [(metric.key, metric.value) for metric in model.metrics] == [("best/eval_loss", 2.0)]
    assert [output.model_id for output in child.outputs.model_outputs] == [model.model_id]
    assert len(client.get_metric_history(child.info.run_id, "best/eval_loss")) == 1


def test_runs_name_their_data_as_inputs(concluded: Path) -> None:
    """Trial and study: the same dataset, its digest as long as MLflow takes it."""
    for run in (_child(concluded), _parent(concluded)):
        (given,) = run.inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("rows.jsonl", "d" * 36)
        assert json.loads(given.dataset.profile)["rows"] == {"train": 32}
        assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_the_parent_run_tells_the_answer(concluded: Path) -> None:
    """Its best trial by name and parameters, its figures, and the pictures as files."""
    parent = _parent(concluded)
    tags = parent.data.tags
    assert (tags["best.trial"], tags["best.adapter.r"]) == ("lora/0000", "8")
    assert parent.data.metrics["best/eval_loss"] == 2.0
    assert tags["mlflow.source.type"] == "LOCAL"
    paths = [item.path for item in _client(concluded).list_artifacts(parent.info.run_id, "figures")]
    assert paths == ["figures/curves.svg"]


def test_an_experiment_that_somebody_made_gets_what_it_lacks(
    tmp_path: Path, empty_store: Path
) -> None:
    """Its primary metric is set; a kind that was chosen stays."""
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(empty_store.read_bytes())
    client = _client(tmp_path)
    location = (tmp_path / "elsewhere").as_uri()
    kind = {"mlflow.experimentKind": "chosen"}
    client.create_experiment("lr_rank_sweep", artifact_location=location, tags=kind)
    _conclude(tmp_path, make_trial(tmp_path))
    tags = client.get_experiment_by_name("lr_rank_sweep").tags
    assert tags["mlflow.experimentKind"] == "chosen"
    assert tags["mlflow.experiment.primaryMetric.name"] == "best/eval_loss"


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
    found, source = dataset_source(paths)
    assert found == kind
    if kind != "external":
        entity = Dataset("d", "1", found, json.dumps(source))
        assert get_source(entity)._get_source_type() == kind


def test_only_a_commit_is_told_as_one() -> None:
    """Outside a working copy the tag has words instead."""
    assert source_tags({"git.commit": "a" * 40})["mlflow.source.git.commit"] == "a" * 40
    assert "mlflow.source.git.commit" not in source_tags({"git.commit": "none: no working copy"})


def test_a_long_description_ends_with_a_line() -> None:
    """No row of a table is cut in two."""
    rows = "\n".join(f"| {number} | {'x' * 50} |" for number in range(1000))
    note = study_ending("FINISHED", {}, {}, rows).tags["mlflow.note.content"]
    assert NOTE_LENGTH - 100 < len(note) <= NOTE_LENGTH
    assert note.endswith(" |")


def test_parameters_are_few_and_stable() -> None:
    """The same names in every run of a method, and whatever else was searched."""
    settings = make_settings().trial
    names = set(recorded(settings))
    assert names <= set(RUN_PARAMS)
    assert len(names) < 30
    searched = recorded(settings, searched=["training.max_grad_norm", "adapter.r"])
    assert set(searched) - names == {"training.max_grad_norm"}
    full = recorded(make_settings("adapter=none", "quantization=none").trial)
    assert {"model.base_model", "training.learning_rate", "seed"} <= set(full) < names
