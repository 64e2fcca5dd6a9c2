"""Make the studies and the night of tests/past/c705442.tar.gz with that commit's code.

    git worktree add ../then c705442 && cp -r tests/past ../then/tests/ && cd ../then
    PYTHONPATH=. python -m tests.past.make_fixtures

When a stored form changes, the last commit that writes the old one gets an archive of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from sweeper.commands.steer import KEPT
from sweeper.core.manifest import write_manifest
from sweeper.nightly.night_run import run_night
from sweeper.tracking import registry
from tests.past.judge import judge
from tests.past.past import (
    C705442,
    FINISHED,
    FIRST_NIGHT,
    QUEUED,
    SET,
    SMALL,
    UNFINISHED,
    WHOLE,
    pack,
)

MADE = Path("/tmp/sweeper-past")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
FIRST = ("finalists=none", "workers.fake.step_seconds=0.0", *SMALL)
THEN = ("workers.fake.step_seconds=0.1", *WHOLE)
OF_NIGHTS = (
    *("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0"),
    *("~hydra.sweeper.arms.full", "training.warmup_ratio=0.0", "data.train=my.jsonl"),
    *("adapter.r=8", "adapter.alpha_over_r=2", "adapter.target_modules=attention"),
    # a stand-in is known by its name; a folder's files also by when they were written
    *("model.base_model='stand_in:qwen3'", "space=tiny", "training=tiny", "evaluation=tiny"),
)


def main() -> None:
    """Run everything in MADE, and keep it."""
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir()
    os.chdir(MADE)
    _finished()
    _unfinished()
    _night()
    pack(MADE, C705442, socket.gethostname())


def _unfinished() -> None:
    """Both arms ended and were extended; Ctrl-C cancelled a trial, kill -9 ended its continuation."""
    subprocess.run(_command(*UNFINISHED, *FIRST), check=True)
    _study("extend", "unfinished", "--trials", "1")
    folder = MADE / "outputs" / "unfinished" / "lora"
    _stop_in(folder / "trial_0008", signal.SIGINT)
    _stop_in(folder / "trial_0009", signal.SIGKILL)
    _study("enqueue", "unfinished", QUEUED)


def _study(*words: str) -> None:
    """Send a command to a study that no driver runs: it is kept, which exit code 3 says."""
    done = subprocess.run((sys.executable, "-m", "sweeper", "study", *words), check=False)
    assert done.returncode == KEPT, done.returncode


def _stop_in(trial: Path, number: signal.Signals) -> None:
    """Start the study, and signal its driver in the middle of a trial."""
    process = subprocess.Popen(_command(*UNFINISHED, *THEN))
    began = len(_lines(trial.with_name("trial_0008") / "metrics.jsonl"))
    _wait(lambda: len(_lines(trial / "metrics.jsonl")) > began)
    process.send_signal(number)
    process.wait(PATIENCE_S)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def _finished() -> None:
    """Two arms to their end, finalists and verdict; its winner has weights of a few bytes."""
    subprocess.run(_command(*FINISHED), check=True)
    best = json.loads((MADE / "outputs/finished/results.json").read_text())["arms"]["lora"]["best"]
    adapter = MADE / f"outputs/finished/lora/trial_{best:04d}/adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("fake weights\n")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}\n')
    write_manifest(adapter)


def _night() -> None:
    """One night of a set; its best beats the untuned base and becomes the champion."""
    rows = [
        {"instruction": f"Add {i}.", "input": "", "output": f"Added {i} to it."} for i in range(40)
    ]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {
        **{"experiment": "lr_rank_sweep", "overrides": list(OF_NIGHTS), "gate": "gate.jsonl"},
        **{"policy": "continue", "n_trials": 3, "extend_by": 2},
    }
    nights = Path("conf/nightly")
    nights.mkdir(parents=True)
    document = {
        **{"defaults": ["default", "_self_"], "experiments": [entry]},
        **{"champion": {"margin": 0.01}, "retention": {"keep_adapters": None}},
    }
    (nights / f"{SET}.yaml").write_text(yaml.safe_dump(document))
    registry._require_adapter = lambda *_: None  # the trainer that only pretends stores no weights
    result = run_night(SET, clock=lambda: FIRST_NIGHT, judge=judge)
    assert result == "new champion", result


def _command(*overrides: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "sweeper", *overrides, "-m")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["LOGNAME"] = "somebody"  # MLflow records it with every run
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    main()
