"""The whole stack with real programs: PostgreSQL, the MLflow server, and a sweep with two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.stack import NEEDS_POSTGRES, PASSWORD, ROOT, Stack, running_stack

pytest.importorskip("psycopg", reason="the driver of PostgreSQL is optional")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_POSTGRES]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """For all tests here: starting it takes longer than they do."""
    with running_stack() as stack:
        yield stack


def test_both_servers_restart_in_the_middle_and_nothing_is_lost(
    stack: Stack, tmp_path: Path
) -> None:
    """Exit 0; every trial once; every metric point and artifact at MLflow; no secret anywhere."""
    process = stack.sweep(
        tmp_path,
        *("hydra.sweeper.n_trials=24", "workers.fake.step_seconds=0.3"),
        "hydra.sweeper.study_name=restarted",
    )
    study = tmp_path / "outputs" / "restarted"
    while len(list(study.glob("lora/*/outcome.json"))) < 4:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.1)
    # a process of any other program may end meanwhile: None instead of its words
    words = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in words if PASSWORD in line]
    stack.script("restart")
    finished = len(list(study.glob("lora/*/outcome.json")))
    assert process.poll() is None, f"too late: {finished} of 24 had ended"
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "not recorded" not in output
    stack.check_recorded("restarted", stack.storage, 24)
    assert PASSWORD not in output
    _nowhere(tmp_path)


def test_a_tracking_server_that_stays_away_costs_records_not_results(
    stack: Stack, tmp_path: Path
) -> None:
    """MLflow frozen for good: the sweep ends with exit 0 and says what was not recorded."""
    with stack.frozen_mlflow():
        sweep = stack.sweep(
            tmp_path, "hydra.sweeper.n_trials=3", "hydra.sweeper.study_name=unrecorded"
        )
        output, _ = sweep.communicate(timeout=300)
        assert sweep.returncode == 0, output
        assert "not recorded in MLflow" in output
        assert len(list(tmp_path.glob("outputs/unrecorded/lora/*/outcome.json"))) == 3


def test_servers_listen_on_the_loopback_and_know_their_names(stack: Stack) -> None:
    """Both ports on 127.0.0.1 only; foreign Host headers are refused."""
    listening = {
        connection.laddr
        for connection in psutil.net_connections("inet")
        if connection.status == "LISTEN" and connection.laddr.port in (stack.postgres, stack.mlflow)
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    for host in ("10.evil.com", "localhost:5000.evil.com", "192.168.evil.com", "mlflow"):
        request = urllib.request.Request(
            f"{stack.uri}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        assert caught.value.code == 403


def test_initialising_again_changes_nothing(stack: Stack) -> None:
    """`start` on running servers is safe, four at once too."""
    environment = {**os.environ, "SWEEPER_STORAGE": stack.storage}
    environment["MLFLOW_BACKEND_STORE_URI"] = stack.storage.replace("/optuna", "/second")
    command = [sys.executable, str(ROOT / "deploy" / "init_databases.py")]
    processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [process.wait(timeout=300) for process in processes] == [0] * 4


def _nowhere(folder: Path) -> None:
    """No file that the study wrote holds the password; the reference to it is what is kept."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    results = json.loads((folder / "outputs" / "restarted" / "results.json").read_text())
    assert "${oc.env:SWEEPER_STORAGE}" in json.dumps(results)
