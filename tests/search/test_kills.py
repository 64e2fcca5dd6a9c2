"""kill -9 of the driver at random moments: nothing is lost, nothing is done twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sweeper.search.states import counts

KILLS = 20
N_TRIALS = 60
ARGUMENTS = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "~hydra.sweeper.arms.full"),
    *("workers.fake.step_seconds=0.02", "hydra.sweeper.n_jobs=2", "sampler=random"),
    *(f"hydra.sweeper.n_trials={N_TRIALS}", "-m"),
)


def _start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sweeper", *ARGUMENTS],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _trials(folder: Path) -> list[FrozenTrial]:
    storage = f"sqlite:///{folder / 'outputs' / 'lr_rank_sweep' / 'study.db'}"
    return optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).get_trials()


def _kill_at_a_random_moment(folder: Path, draw: random.Random) -> None:
    """Up to two seconds after the driver first touched its database, the moments of start included."""
    database = folder / "outputs" / "lr_rank_sweep" / "study.db"
    before = database.stat().st_mtime_ns if database.exists() else 0
    process = _start(folder)
    deadline = time.monotonic() + 120
    while not (database.exists() and database.stat().st_mtime_ns > before):
        assert time.monotonic() < deadline, process.communicate()[0]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 2.0))
    process.kill()
    process.communicate()


def _finished(folder: Path) -> dict[int, tuple[object, int]]:
    """What every finished trial was worth, and when its folder was completed."""
    outcomes = folder / "outputs" / "lr_rank_sweep" / "lora"
    return {
        trial.number: (
            trial.values,
            (outcomes / f"trial_{trial.number:04d}" / "outcome.json").stat().st_mtime_ns,
        )
        for trial in _trials(folder)
        if counts(trial) and trial.state is not TrialState.FAIL
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """The total is exactly n_trials, no finished trial is trained again, none is left RUNNING."""
    draw = random.Random(20)
    known: dict[int, tuple[object, int]] = {}
    for _ in range(KILLS):
        _kill_at_a_random_moment(tmp_path, draw)
        try:
            now = _finished(tmp_path)
        except KeyError:  # killed before the study was made
            continue
        assert known.items() <= now.items()
        known = now
    process = _start(tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    final = _trials(tmp_path)
    assert sum(map(counts, final)) == N_TRIALS
    assert {trial.state for trial in final} <= {
        *(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }
    assert known.items() <= _finished(tmp_path).items()
    assert "duplicate" not in [trial.user_attrs["cause"] for trial in final]
    lost = [trial for trial in final if trial.user_attrs["cause"] == "crash"]
    assert all(trial.user_attrs["attempt"] >= 3 for trial in lost)
