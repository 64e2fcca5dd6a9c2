"""Signals: real ones, sent to the real program with fake trainers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from sweeper.commands.run_study import run_study
from sweeper.core.signals import StopRequested, deferred_interrupt
from sweeper.search.study_plan import studies

CHILD = """
import tempfile, time
from sweeper.core.signals import exit_with_parent
exit_with_parent()
with tempfile.TemporaryDirectory() as place:
    print(place, flush=True)
    time.sleep(600)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
STUDY = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "pruner=none"),
    *("~hydra.sweeper.arms.full", "hydra.sweeper.n_trials=3", "workers.fake.step_seconds=0.1"),
)


def _start(tmp_path: Path, *overrides: str, engine: str = "local") -> subprocess.Popen[str]:
    """A study whose first trial is in the middle of its twenty steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *STUDY, f"workers.engine={engine}", *overrides, "-m"],
        *(-1, None, None, subprocess.PIPE, subprocess.STDOUT),
        cwd=tmp_path,
        text=True,
        start_new_session=True,
    )
    spool = _study(tmp_path) / "lora" / "trial_0000" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (spool.exists() and spool.read_text()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _study(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "lr_rank_sweep"


def _trials(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{_study(tmp_path) / 'study.db'}"
    return optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGUSR1, 75),
        pytest.param(signal.SIGUSR2, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_study_exits_with_its_code_and_continues_where_it_was(
    tmp_path: Path, number: signal.Signals, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoint, final states, the resume command; then at most one step is taken twice."""
    process = _start(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == exit_code, output
    assert "Resume     python -m sweeper +experiment=lr_rank_sweep" in output
    (stopped,) = [t for t in _trials(tmp_path) if t.state is not TrialState.WAITING]
    assert (stopped.state, stopped.user_attrs["cause"]) == (TrialState.FAIL, "cancelled")
    folder = _study(tmp_path) / "lora" / "trial_0000"
    reached = json.loads((folder / "checkpoints" / "fake.json").read_text())["step"]
    assert 0 < reached < 20
    before = (folder / "metrics.jsonl").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    (again,) = studies([*STUDY, "workers.fake.step_seconds=0.0", "workers.engine=inline"])
    run_study(again)
    continued = _trials(tmp_path)[1]
    assert continued.user_attrs["continues"] == 0
    assert continued.params == stopped.params
    told = [round(step * 20 / 1000) for step in continued.intermediate_values]
    assert told == [4, 8, 12, 16, 20], "what the stopped trial measured counts for the pruner"
    lines = (_study(tmp_path) / "lora" / "trial_0001" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16, 20]
    kept = [line for line in before if json.loads(line)["step"] <= reached]
    assert lines[: len(kept)] == kept, "measured once"
    assert sum(trial.state is TrialState.COMPLETE for trial in _trials(tmp_path)) == 3


def test_the_second_signal_ends_the_program_at_once(tmp_path: Path) -> None:
    """A worker that hangs cannot hold up who asks twice, and does not outlive the program."""
    process = _start(tmp_path, "++workers.fake.plan={0: hang}", "workers.stall_timeout_s=null")
    time.sleep(1.0)  # half-way it hangs
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "it gives the trial a while to end"
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)
    assert process.returncode == 143
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


@pytest.mark.slow
def test_a_hanging_worker_does_not_hold_up_the_first_signal_for_long(tmp_path: Path) -> None:
    """The trial cannot be asked to end; the study ends with final states all the same."""
    process = _start(tmp_path, "++workers.fake.plan={0: hang}")
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    assert process.returncode == 130
    assert TrialState.RUNNING not in {trial.state for trial in _trials(tmp_path)}


@pytest.mark.slow
def test_ray_leaves_the_signals_to_us(tmp_path: Path) -> None:
    """Ray installs a SIGTERM handler of its own; the study still ends with final states and 143."""
    pytest.importorskip("ray")
    process = _start(tmp_path, engine="ray")
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert TrialState.RUNNING not in {trial.state for trial in _trials(tmp_path)}


def test_what_was_ignored_stays_ignored() -> None:
    """Under nohup a lost terminal stops nothing; handlers are put back afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupt.check()
            os.kill(os.getpid(), signal.SIGUSR1)
            with pytest.raises(StopRequested) as stopped:
                interrupt.check()
        assert stopped.value.exit_code == 75
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_times_steps_leaves_with_its_parent(number: signal.Signals) -> None:
    """A stopped dry run leaves neither a process that trains nor a gigabyte of weights."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    place = Path(parent.stdout.readline().strip())
    (child,) = psutil.Process(parent.pid).children()
    assert place.is_dir()
    parent.send_signal(number)
    parent.wait(60)
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()
    assert not place.exists()
