"""The tracker against `mlflow server` itself: hung for a while, then back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.tracking_server import TrackingServer
from tests.tracking.test_mlflow_tracker import STUDY, make_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Real:
    """A server of the installed version, in a process group of its own."""

    uri: str
    group: int

    def send(self, number: signal.Signals) -> None:
        """To the server and its workers."""
        os.killpg(self.group, number)


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """Started once for all tests: it takes half a minute."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    server = Real(f"http://127.0.0.1:{port}", process.pid)
    try:
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{server.uri}/health", timeout=5):
                break
            time.sleep(0.5)
        yield server
    finally:
        server.send(signal.SIGKILL)
        process.wait()


def test_a_server_that_hangs_delays_the_end_by_seconds_and_loses_nothing(
    real_server: Real, tmp_path: Path
) -> None:
    """Frozen in mid-study: the end counts what is left; thawed, a later process ships it."""
    trial = make_trial(tmp_path)
    ledger = tmp_path / "mine" / ".tracking"
    tracker = MlflowTracker(TrackingServer(real_server.uri, tmp_path), ledger)
    tracker.open_study(STUDY)
    tracker.start(trial)
    while not (ledger / "shipped" / "lora" / "0000.json").exists():
        time.sleep(0.1)
    real_server.send(signal.SIGSTOP)
    try:
        tracker.ship(trial)
        tracker.end(trial, "FINISHED", {"best/eval_loss": 2.0}, {"cause": "finished"})
        tracker.keep([trial.folder])
        tracker.close_study("FINISHED", {}, {}, "# the answer", [])
        (problem,) = tracker.close()
    finally:
        real_server.send(signal.SIGCONT)
    assert "final states of 2 runs" in problem
    tracker._thread.join()  # a process that ends takes its hung request with it; this one lives on
    assert MlflowTracker(TrackingServer(real_server.uri, tmp_path), ledger).close() == []
    client = MlflowClient(real_server.uri)
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    child = next(run for run in runs if run.info.run_name == "lora/0000")
    history = client.get_metric_history(child.info.run_id, "eval/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0)]
    paths = {item.path for item in client.list_artifacts(child.info.run_id, "adapter")}
    assert "adapter/manifest.json" in paths
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.status.name == "READY"
