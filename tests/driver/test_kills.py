"""kill -9 of the driver at random moments: nothing is lost, nothing is done twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sweeper.driver.jobs import MAX_ATTEMPTS
from sweeper.search.telling import counts

KILLS = 20
N_TRIALS = 80
"""More than get done before the last kill, on a fast machine too."""
ARGUMENTS = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "~hydra.sweeper.arms.full"),
    *("workers.fake.step_seconds=0.05", "hydra.sweeper.n_jobs=2", "sampler=random"),
    *(f"hydra.sweeper.n_trials={N_TRIALS}", "-m"),
)


def _start(folder: Path, arguments: Sequence[str] = ARGUMENTS) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sweeper", *arguments],
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


def _real(base: Path, rows: Path) -> tuple[str, ...]:
    """A grid, whose points do not depend on when a sampler was seeded anew."""
    return (
        *("+experiment=lr_rank_sweep", "tracking=none", "~hydra.sweeper.arms.full"),
        *("finalists=none", "quantization=none", f"model.base_model={base}"),
        *(f"data.train={rows}", "data.max_length=128", "evaluation=tiny", "training=tiny"),
        *("space=tiny", "training.max_steps=24", "training.eval_steps=4", "sampler=grid"),
        *("training.learning_rate=1e-3,3e-3,1e-2", "adapter.r=choice(2,4,8,16)"),
        *("adapter.alpha_over_r=2", "adapter.target_modules=attention,mlp"),
        *("training.warmup_ratio=0.05", "pruner=none", "training.early_stopping_patience=null"),
        *("hydra.sweeper.n_trials=24", "hydra.sweeper.study_name=lr_rank_sweep", "-m"),
    )


def _wait_for_a_trial(process: subprocess.Popen[str], folder: Path, since: float) -> None:
    """Until this run's worker has begun one, or there is none left to begin."""
    trials = folder / "outputs" / "lr_rank_sweep" / "lora"
    while process.poll() is None:
        begun = (path.stat().st_mtime for path in trials.glob("trial_*/config.yaml"))
        if any(moment > since for moment in begun):
            return
        time.sleep(0.05)


def _values(folder: Path) -> dict[str, float]:
    """What every finished point was worth."""
    return {
        str(sorted(trial.params.items())): trial.values[0]
        for trial in _trials(folder)
        if trial.state is TrialState.COMPLETE
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_of_a_real_sweep_change_no_result(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """The total is exactly n_trials, and every point is worth what it is worth undisturbed.

    A quarter of the kills fall into the start, the others into the training of a trial. Only a trial
    that was hit in all of its three attempts is lost, as a crash.
    """
    arguments, draw = _real(tiny_base, rows_file), random.Random(20)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    process = _start(undisturbed, arguments)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    expected = _values(undisturbed)
    assert len(expected) == 24

    known: dict[int, tuple[object, int]] = {}
    for number in range(KILLS):
        since = time.time()
        process = _start(disturbed, arguments)
        if number % 4:
            _wait_for_a_trial(process, disturbed, since)
        time.sleep(draw.uniform(0.0, 4.0))
        process.kill()
        process.communicate()
        if (disturbed / "outputs" / "lr_rank_sweep" / "study.db").exists():
            try:
                now = _finished(disturbed)
            except KeyError:  # killed before the study was made
                continue
            assert known.items() <= now.items()
            known = now
    process = _start(disturbed, arguments)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    final = _trials(disturbed)
    assert sum(map(counts, final)) == 24
    assert not [trial for trial in final if not trial.state.is_finished()]
    assert known.items() <= _finished(disturbed).items()
    lost = [trial for trial in final if trial.state is TrialState.FAIL]
    assert all(trial.user_attrs["cause"] == "crash" for trial in lost)
    assert all(trial.user_attrs["attempt"] >= MAX_ATTEMPTS for trial in lost)
    values = _values(disturbed)
    assert len(values) == 24 - len(lost)
    assert values == pytest.approx({point: expected[point] for point in values}, rel=1e-6)
