"""A company's own MLflow server: its credentials, an older version, a lost answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeper.tracking import mlflow_tracker
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.tracker import TrialRecord
from sweeper.tracking.tracking_server import TrackingServer
from tests.tracking.fake_server import PASSWORD, USER, OldServer, old_server
from tests.tracking.test_mlflow_tracker import STUDY, make_trial


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OldServer]:
    """MLflow 2.9.2 that asks for a name and a password, which the environment has."""
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", (0.01,))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with old_server() as state:
        yield state


def _record(folder: Path, uri: str, trial: TrialRecord) -> list[str]:
    tracker = MlflowTracker(TrackingServer(uri, folder / "mlruns"), folder / "mine" / ".tracking")
    tracker.open_study(STUDY)
    tracker.start(trial)
    tracker.ship(trial)
    tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0}, {"cause": "finished"})
    tracker.keep([trial.folder])
    tracker.close_study("FINISHED", {}, {}, "# the answer", [])
    return tracker.close()


def test_an_older_server_gets_what_it_can_hold(tmp_path: Path, server: OldServer) -> None:
    """Runs, points, tags and the adapter as artifacts; that it has no LoggedModels is said once."""
    (remark,) = _record(tmp_path, server.uri, make_trial(tmp_path))
    assert "runs MLflow 2.9.2, which has no LoggedModels" in remark
    assert [run["info"]["status"] for run in server.runs.values()] == ["FINISHED", "FINISHED"]
    assert server.steps("eval/loss") == [1, 2]
    assert list(server.files)[-1] == f"{list(server.runs)[1]}/adapter/manifest.json"
    assert not [path for path in server.asked if "logged-models" in path]


def test_a_server_that_hides_its_version_is_asked_and_may_refuse(
    tmp_path: Path, server: OldServer
) -> None:
    """Behind a proxy /version says nothing: the missing endpoint is found out, the rest recorded."""
    server.version = "hello"
    (remark,) = _record(tmp_path, server.uri, make_trial(tmp_path))
    assert "no LoggedModels" in remark
    assert [path for path in server.asked if "logged-models" in path] != []
    assert len(server.runs) == 2


def test_wrong_credentials_are_said_with_what_to_set(
    tmp_path: Path, server: OldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """401 is no outage: it is said, with MLflow's own variables; the password is not shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "otto")
    (problem,) = _record(tmp_path, server.uri, make_trial(tmp_path))
    assert "refuses access" in problem
    assert (
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN" in problem
    )
    assert PASSWORD not in problem
    assert server.runs == {}


def test_a_store_that_keeps_doubles_gets_none(tmp_path: Path, server: OldServer) -> None:
    """Two answers are lost after the points were stored: the store is asked, nothing is sent again."""
    server.lose_answers = 2
    trial = make_trial(tmp_path)
    (remark,) = _record(tmp_path, server.uri, trial)
    assert "no LoggedModels" in remark
    assert server.lose_answers == 0
    assert server.steps("eval/loss") == [1, 2]
    assert server.steps("best/eval_loss") == [0]
