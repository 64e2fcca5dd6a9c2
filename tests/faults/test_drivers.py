"""R2, R3, R16, R17: drivers that are killed, and several that start at once."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from tests.faults.conftest import Launch
from tests.faults.sweep import FAKE, STUDY, Sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOTAL = 1000
READY_CPU_S = 10.0
GRID = (
    *("sampler=grid", "training.learning_rate=1e-3,3e-3,1e-2", "adapter.r=2,4,8,16"),
    *("adapter.alpha_over_r=2", "adapter.target_modules=mlp", "training.warmup_ratio=0.03"),
)
"""Twelve points."""


def _fill(sweep: Sweep, total: int) -> None:
    """Copies of the study's one trial, at other points, as if trained before; in one transaction."""
    with sqlite3.connect(sweep.study / "study.db") as database:
        database.row_factory = sqlite3.Row
        for table in COPIED:
            first = [dict(row) for row in database.execute(f"select * from {table}")]
            rows = [_copy(row, number) for number in range(1, total) for row in first]
            names = ", ".join(f":{name}" for name in rows[0])
            columns = names.replace(":", "")
            database.executemany(f"insert into {table} ({columns}) values ({names})", rows)


COPIED = ("trials", "trial_params", "trial_values", "trial_user_attributes")


def _copy(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row of trial 0 as one of another trial, whose learning rate is its own."""
    rate = 1e-3 + number * 1e-6
    copy = {name: value for name, value in row.items() if name not in ROW_IDS}
    copy["trial_id"] = row["trial_id"] + number
    if "number" in copy:
        copy["number"] = number
    if copy.get("param_name") == "training.learning_rate":
        copy["param_value"] = rate
    if copy.get("key") == "point":
        point = {**json.loads(row["value_json"]), "training.learning_rate": rate}
        copy["value_json"] = json.dumps(point)
    return copy


ROW_IDS = ("param_id", "trial_value_id", "trial_user_attribute_id")


@pytest.mark.timeout(600)
def test_a_study_of_a_thousand_trials_is_ready_within_ten_seconds(
    launch: Launch, tmp_path: Path
) -> None:
    """CPU time from the command to the first new trial; none of the old ones is touched."""
    one = launch("tracking=none", "hydra.sweeper.n_trials=1", "workers.fake.step_seconds=0")
    one.end()
    _fill(one, TOTAL)
    known = {trial.number: trial.value for trial in one.trials()}
    sweep = launch(
        "tracking=none", f"hydra.sweeper.n_trials={TOTAL + 1}", "workers.fake.step_seconds=0.2"
    )
    sweep.until(sweep.trial(TOTAL).exists, "the first new trial began")
    used = psutil.Process(sweep.process.pid).cpu_times()
    sweep.end()
    trials = sweep.trials()
    assert len(trials) == TOTAL + 1
    assert known.items() <= {trial.number: trial.value for trial in trials}.items()
    assert used.user + used.system < READY_CPU_S


def test_two_orchestrators_and_eight_workers_train_each_point_once(launch: Launch) -> None:
    """A grid of 12: the second driver is refused, nothing is trained twice, the total is exact."""
    arguments = (
        *("tracking=none", "hydra.sweeper.n_jobs=8", "workers.fake.step_seconds=0.1"),
        *(*GRID, "hydra.sweeper.n_trials=12", "workers.stall_timeout_s=null"),
    )
    both = [launch(*arguments) for _ in range(2)]
    while not (ready := [each for each in both if len(each.workers()) == 8]):
        time.sleep(0.01)
    (winner,) = ready
    loser = next(each for each in both if each is not winner)
    with winner.held():
        assert "already run by another driver" in loser.end(exit_code=1)
    winner.end()
    trials = both[0].check_each_once(12)
    points = {tuple(sorted(trial.params.items())) for trial in trials}
    assert len(points) == 12
    assert {trial.user_attrs["attempt"] for trial in trials} == {1}


def test_two_folders_on_one_database_are_two_drivers(launch: Launch, tmp_path: Path) -> None:
    """The same study on the same SQLite file from another folder: refused, and says by whom."""
    (tmp_path / "elsewhere").mkdir()
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path / 'shared.db'}"
    slow = (
        *("tracking=none", "hydra.sweeper.n_trials=2", "workers.stall_timeout_s=null", storage),
        "workers.fake.step_seconds=0.2",
    )
    first = launch(*slow, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    first.until_steps()
    with first.held():
        second = launch(*slow, folder=tmp_path / "elsewhere")
        assert "of this database is already run by another driver" in second.end(exit_code=1)
    first.end()
    first.check_each_once(2)


def test_eight_studies_start_at_once_in_an_empty_folder(launch: Launch, tmp_path: Path) -> None:
    """Neither Optuna's database nor MLflow's is there yet: eight of eight finish and are recorded."""
    started = [
        launch(
            *("hydra.sweeper.n_trials=1", "workers.fake.step_seconds=0", "workers.engine=inline"),
            f"hydra.sweeper.storage=sqlite:///{tmp_path / 'all.db'}",
            name=f"start_{number}",
        )
        for number in range(8)
    ]
    for each in started:
        assert "not recorded" not in each.end()
    code = (
        "from mlflow import MlflowClient; c = MlflowClient('sqlite:///mlruns/mlflow.db');"
        "e = c.get_experiment_by_name('lr_rank_sweep').experiment_id;"
        "print(sorted((r.info.status, r.info.run_name) for r in c.search_runs([e])))"
    )
    runs = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wanted = [("FINISHED", f"start_{number}") for number in range(8)]
    assert runs.stdout.strip() == str(sorted([("FINISHED", "lora/0000")] * 8 + wanted))


FEW = (
    *("workers.fake.steps=2", "adapter.alpha_over_r=2", "adapter.target_modules=mlp"),
    *("training.warmup_ratio=0.03", "adapter.r=8"),
)
"""Two evaluations, one searched key: few writes, of every kind."""
DYING = Path(__file__).with_name("dying.py")


@pytest.mark.timeout(900)
def test_a_driver_killed_between_any_two_writes_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    """kill -9 after the first, second, … write of a study of one trial; the same command ends it."""
    command = [sys.executable, str(DYING), *FAKE, f"hydra.sweeper.study_name={STUDY}"]
    result = subprocess.run(
        [
            *(*command, "tracking=none", "workers.engine=inline"),
            *("hydra.sweeper.n_trials=1", "workers.fake.step_seconds=0", *FEW),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    kills = int(result.stdout.split()[-1])
    assert kills >= 10, "a trial is asked, handed out, reported and told"
    for number in range(1, kills + 1):
        storage = f"sqlite:///{tmp_path}/killed_{number}/{STUDY}/study.db"
        trials = optuna.load_study(study_name=f"{STUDY}/lora", storage=storage).get_trials()
        counted = [trial for trial in trials if trial.user_attrs.get("counts")]
        assert len(counted) == 1, (number, trials)
        assert {trial.user_attrs["cause"] for trial in counted} == {"finished"}, number
        assert {trial.state for trial in trials} == {TrialState.COMPLETE}, number
