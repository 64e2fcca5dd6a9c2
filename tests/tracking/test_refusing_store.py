"""What MLflow refuses is asked before the first trial, and what was deleted in its UI is made again."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, validate
from sweeper.core.errors import TrackingError
from sweeper.tracking.run_pages import DESCRIPTION_TAG, VIEW_TAG
from sweeper.tracking.shipment import PARENT_TAG, RunShipper
from sweeper.tracking.tracker import TrialRecord
from sweeper.tracking.tracker_factory import browse_command
from tests.tracking.test_mlflow_tracker import (
    NOWHERE,
    STUDY,
    _client,
    _runs,
    _tracker,
    impatient,  # noqa: F401 - a fixture
    trial,  # noqa: F401 - a fixture
)


def _recorded(folder: Path, record: TrialRecord) -> MlflowClient:
    """Record a study with one trial, and return a client of its store."""
    tracker = _tracker(folder)
    tracker.open_study(STUDY)
    tracker.start(record)
    tracker.end(record, "FINISHED", {"best/eval_loss": 2.0}, {"cause": "finished"})
    tracker.close_study("FINISHED", {}, {}, "done", [])
    assert tracker.close() == []
    return _client(folder)


def test_a_deleted_experiment_is_said_before_the_first_trial(
    tmp_path: Path,
    trial: TrialRecord,  # noqa: F811
) -> None:
    """The message names the command that restores the experiment, and two ways around it."""
    client = _recorded(tmp_path, trial)
    experiment = client.get_experiment_by_name("lr_rank_sweep").experiment_id
    client.delete_experiment(experiment)
    tracker = _tracker(tmp_path)
    tracker.open_study(STUDY)
    with pytest.raises(TrackingError) as refusal:
        tracker.require_store()
    words = str(refusal.value)
    assert f"mlflow experiments restore --experiment-id {experiment}" in words
    assert "tracking=none" in words
    tracker.close()


def test_the_answer_to_an_earlier_entry_is_not_the_answer_to_this_study(
    tmp_path: Path,
    trial: TrialRecord,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tracker looks through the ledger when it starts. Its study may be opened meanwhile."""
    client = _recorded(tmp_path, trial)
    client.delete_experiment(client.get_experiment_by_name("lr_rank_sweep").experiment_id)
    opened, shipping, ship = threading.Event(), threading.Event(), RunShipper.ship

    def slowly(self: RunShipper, key: str) -> None:
        if opened.is_set():
            time.sleep(0.3)
            return ship(self, key)
        ship(self, key)
        shipping.set()
        opened.wait(10)

    monkeypatch.setattr(RunShipper, "ship", slowly)
    tracker = _tracker(tmp_path)
    assert shipping.wait(10)
    tracker.open_study(STUDY)
    opened.set()
    with pytest.raises(TrackingError, match="restore"):
        tracker.require_store()
    tracker.close()


@pytest.mark.parametrize("uri", ["file:./elsewhere", "./elsewhere", "foo://elsewhere"])
def test_a_store_of_a_wrong_kind_is_said_before_the_first_trial(tmp_path: Path, uri: str) -> None:
    """A store that this MLflow does not write to is refused, and one that it does is named."""
    tracker = _tracker(tmp_path, uri)
    tracker.open_study(STUDY)
    with pytest.raises(TrackingError, match=r"sqlite:///mlruns/mlflow\.db"):
        tracker.require_store()
    tracker.close()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_stops_no_study(tmp_path: Path) -> None:
    """An outage is not a refusal: the first trial starts."""
    tracker = _tracker(tmp_path, NOWHERE)
    tracker.open_study(STUDY)
    assert tracker.require_store() is not None
    assert tracker.close() != []


def test_a_parent_deleted_in_the_ui_is_made_again(
    tmp_path: Path,
    trial: TrialRecord,  # noqa: F811
) -> None:
    """A resumed study gets a new parent run, and the runs of its trials belong to that one."""
    client = _recorded(tmp_path, trial)
    (parent,) = (run for run in _runs(tmp_path) if run.info.run_name == "mine")
    client.delete_run(parent.info.run_id)
    tracker = _tracker(tmp_path)
    tracker.open_study(STUDY)
    tracker.require_store()
    tracker.close_study("FINISHED", {}, {}, "done", [])
    assert tracker.close() == []
    (again,) = (run for run in _runs(tmp_path) if run.info.run_name == "mine")
    (child,) = (run for run in _runs(tmp_path) if run.info.run_name == "lora/0000")
    assert again.info.run_id != parent.info.run_id
    assert child.data.tags[PARENT_TAG] == again.info.run_id


def test_a_trial_deleted_in_the_ui_is_made_again(
    tmp_path: Path,
    trial: TrialRecord,  # noqa: F811
) -> None:
    """Another attempt of a trial whose run was deleted has a run with all of its points."""
    client = _recorded(tmp_path, trial)
    (child,) = (run for run in _runs(tmp_path) if run.info.run_name == "lora/0000")
    client.delete_run(child.info.run_id)
    tracker = _tracker(tmp_path)
    tracker.open_study(STUDY)
    tracker.start(trial)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 1.0}, {"cause": "finished"})
    assert tracker.close() == []
    (again,) = (run for run in _runs(tmp_path) if run.info.run_name == "lora/0000")
    assert again.info.run_id != child.info.run_id
    assert len(client.get_metric_history(again.info.run_id, "eval/loss")) == 2


def test_an_experiment_shows_its_trials_with_metrics(
    tmp_path: Path,
    trial: TrialRecord,  # noqa: F811
) -> None:
    """The experiment has a description, and a view whose columns are metrics of its runs."""
    client = _recorded(tmp_path, trial)
    tags = client.get_experiment_by_name("lr_rank_sweep").tags
    view = json.loads(tags[VIEW_TAG])
    assert "metrics.`best/eval_loss`" in view["selectedColumns"]
    assert view["orderByKey"] == "metrics.`best/eval_loss`"
    assert view["orderByAsc"] is True
    assert "viewStateShareKey=" in tags[DESCRIPTION_TAG]


def test_the_printed_ui_starts_no_job_processes() -> None:
    """MLflow's job runner is off, and one process answers."""
    printed = browse_command(validate(RunSettings, compose(["tracking=mlflow"]).config).tracking)
    assert printed.startswith("MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui ")
    assert "--workers 1" in printed
