"""R7, R8, R10, R15, R16: PostgreSQL and MLflow, the real ones, that crash, hang and come back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper.core.manifest import verify_manifest, write_manifest
from tests.deploy.stack import NEEDS_POSTGRES, STORAGE, Stack, running_stack
from tests.faults.conftest import Launch
from tests.faults.sweep import DEADLINE_S, Sweep, spool

pytest.importorskip("psycopg", reason="the driver of PostgreSQL is optional")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_POSTGRES]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """For all tests here."""
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stored(stack: Stack, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a sweep whose study lies in PostgreSQL, under a name of its own."""
    name = str(request.node.name)[5:60]
    return {
        "storage": stack.storage,
        "environment": {"SWEEPER_STORAGE": stack.storage},
        "name": name,
    }


@pytest.fixture
def tracked(stack: Stack, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a sweep that is recorded by the server, under a name of its own."""
    environment = {"MLFLOW_TRACKING_URI": stack.uri}
    return {"environment": environment, "name": str(request.node.name)[5:60]}


def _sync(stack: Stack, sweep: Sweep) -> subprocess.Popen[bytes]:
    """`sweeper sync` of a study, under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "sweeper", "sync", sweep.name],
        cwd=sweep.folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": stack.uri},
    )


def _local(sweep: Sweep) -> str:
    return f"sqlite:///{sweep.study / 'study.db'}"


def test_training_outlives_postgres_and_nobody_takes_over(
    stack: Stack, launch: Launch, tmp_path: Path, stored: dict[str, Any]
) -> None:
    """Crashed in mid-trial: training goes on to its end, nothing is asked until the database is back.

    Then every result is told once, in its first attempt; and another driver is refused, as before.
    """
    (tmp_path / "elsewhere").mkdir()
    overrides = ("tracking=none", STORAGE, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2")
    slow = ("workers.fake.step_seconds=0.2", "workers.stall_timeout_s=null")
    sweep = launch(*overrides, *slow, **stored)
    sweep.until_steps(2)
    stack.crash_postgres()
    begun = set(sweep.attempts())
    down = {path: len(spool(path)) for path in begun}
    sweep.until(
        lambda: all((path / "outcome.json").exists() for path in begun), "what was training ended"
    )
    assert any(len(spool(path)) > lines for path, lines in down.items()), (
        "trained while it was down"
    )
    assert sweep.attempts() == {}, "nothing was handed out"
    assert sweep.process.poll() is None
    starting = stack.begin("start")
    sweep.until(sweep.attempts, "it goes on")
    with sweep.held():
        other = launch(*overrides, *slow, folder=tmp_path / "elsewhere", **stored)
        assert "is already run by another driver (sweeper" in other.end(exit_code=1)
    assert starting.wait(DEADLINE_S) == 0
    sweep.end()
    trials = sweep.check_each_once(8)
    assert {trial.user_attrs["attempt"] for trial in trials} == {1}


def test_a_driver_that_is_started_while_postgres_is_away_waits_for_it(
    stack: Stack, launch: Launch, stored: dict[str, Any]
) -> None:
    """It says so within seconds, keeps to the end of its time, and runs the study when it is back."""
    overrides = ("tracking=none", STORAGE, "workers.fake.step_seconds=0.02")
    launch(*overrides, "hydra.sweeper.n_trials=2", **stored).end()
    stack.crash_postgres()
    more = (*overrides, "hydra.sweeper.n_trials=4")
    began = time.monotonic()
    limited = launch(*more, "budget.wall_clock=3s", **stored)
    assert "The study's time is used up" in limited.end(exit_code=1)
    assert time.monotonic() - began < 60
    sweep = launch(*more, **stored)
    sweep.until(lambda: "waiting for the study's database" in sweep.output, "it said so")
    assert stack.begin("start").wait(DEADLINE_S) == 0
    sweep.end()
    sweep.check_each_once(4)


def test_a_study_without_mlflow_is_synced_later(
    stack: Stack, launch: Launch, tracked: dict[str, Any]
) -> None:
    """A server that hangs all the time: exit 0, what is missing is said, and sync records it all."""
    with stack.frozen_mlflow():
        sweep = launch("hydra.sweeper.n_trials=3", **tracked)
        output = sweep.end()
    sweep.check_each_once(3)
    assert "not recorded in MLflow: " in output
    assert f"sync {sweep.name}" in output
    assert _sync(stack, sweep).wait(DEADLINE_S) == 0
    stack.check_recorded(sweep.name, _local(sweep), 3)


def test_what_was_not_shipped_before_a_kill_is_shipped_by_the_next_start(
    stack: Stack, launch: Launch, tracked: dict[str, Any]
) -> None:
    """kill -9 of driver and workers while MLflow hangs: all points of all trials, each once."""
    overrides = ("hydra.sweeper.n_trials=4", "workers.fake.step_seconds=0.1")
    with stack.frozen_mlflow():
        sweep = launch(*overrides, **tracked)
        sweep.until_steps(2)
        sweep.kill()
    again = launch(*overrides, **tracked)
    assert "not recorded" not in again.end()
    again.check_each_once(4)
    stack.check_recorded(again.name, _local(again), 4)


def test_a_kill_in_mid_upload_leaves_nothing_that_looks_whole(
    stack: Stack, launch: Launch, tracked: dict[str, Any], tmp_path: Path
) -> None:
    """Of an adapter of forty files some are there, its manifest is not; the next sync completes it."""
    from mlflow import MlflowClient

    with stack.frozen_mlflow():
        sweep = launch("hydra.sweeper.n_trials=1", **tracked)
        sweep.end()
    adapter = sweep.trial(0) / "adapter"
    adapter.mkdir()
    for number in range(40):
        (adapter / f"part_{number:02d}.safetensors").write_bytes(os.urandom(2**20))
    write_manifest(adapter)
    client = MlflowClient(stack.uri)

    def runs() -> list[str]:
        experiment = client.get_experiment_by_name("lr_rank_sweep")
        query = f"tags.`sweeper.study` = '{sweep.name}' and tags.`sweeper.trial` = 'lora/0000'"
        found = client.search_runs([experiment.experiment_id], query) if experiment else []
        return [run.info.run_id for run in found]

    def stored() -> set[str]:
        return {item.path for run in runs() for item in client.list_artifacts(run, "adapter")}

    killed = _sync(stack, sweep)
    deadline = time.monotonic() + DEADLINE_S
    while not stored():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert 0 < len(stored()) < 41, "killed in the middle"
    assert "adapter/manifest.json" not in stored()
    assert _sync(stack, sweep).wait(DEADLINE_S) == 0
    assert len(stored()) == 41
    (run,) = runs()
    verify_manifest(Path(client.download_artifacts(run, "adapter", str(tmp_path))))
