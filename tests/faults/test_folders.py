"""R26: a killed real trial in a folder that another study takes over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeper.core.paths import TrialFolder
from tests.conftest import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE_S = 240.0
OTHER_STORAGE = "hydra.sweeper.storage=sqlite:///other.db"


def _command(base: Path, rows: Path, rate: float, *overrides: str) -> list[str]:
    return [
        *("+experiment=lr_rank_sweep", "hydra.sweeper.study_name=mine", "tracking=none"),
        *(f"model.base_model={base}", f"data.train={rows}", "quantization=none", "space=tiny"),
        *("training=tiny", "evaluation=tiny", "pruner=none", "finalists=none"),
        *("~hydra.sweeper.arms.full", "hydra.sweeper.n_trials=1", "sampler=random"),
        *("adapter.r=4", "adapter.alpha_over_r=2", "adapter.target_modules=attention"),
        *(f"training.learning_rate={rate}", "training.warmup_ratio=0.0", "training.max_steps=400"),
        *("training.eval_steps=4", "training.save_steps=4", *overrides, "-m"),
    ]


def _kill_after_a_checkpoint(command: list[str], folder: Path) -> TrialFolder:
    """Start a study and kill its driver and worker once a checkpoint is whole."""
    trial = TrialFolder(folder / "outputs/mine/lora/trial_0000")
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *command], cwd=folder, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any(trial.checkpoints.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None, "it ended before a checkpoint"
        assert time.monotonic() < deadline, "it never stored a checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not trial.outcome.exists(), "too late for a kill"
    return trial


@pytest.mark.parametrize("how", ["switched", "deleted"])
def test_a_killed_trial_is_not_continued_under_another_rate(
    how: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """kill -9 at 1e-3, then 2e-2 without the storage: the losses of 2e-2 from its first step."""
    killed = _kill_after_a_checkpoint(_command(tiny_base, rows_file, 0.001), tmp_path)
    overrides = [OTHER_STORAGE] if how == "switched" else []
    if how == "deleted":
        (tmp_path / "outputs/mine/study.db").unlink()
    second = _command(tiny_base, rows_file, 0.02, *overrides)
    done = run_program(second, tmp_path, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    assert run_program(_command(tiny_base, rows_file, 0.02), alone, PATIENCE_S).returncode == 0
    undisturbed = TrialFolder(alone / "outputs/mine/lora/trial_0000")
    found, expected = (json.loads(each.outcome.read_text()) for each in (killed, undisturbed))
    assert found["best_value"] == expected["best_value"]
    assert found["steps"] == expected["steps"]
    assert any(
        (tmp_path / "outputs/mine/set_aside/studies").glob("*/lora/trial_0000/checkpoints/*")
    )
