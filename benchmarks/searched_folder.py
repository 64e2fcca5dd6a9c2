"""Run or continue a search by the command line in a folder of its own, and read its trials."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from sweeper.search.telling import counts

STUDY = "lr_rank_sweep"
COMMON = (
    *(f"+experiment={STUDY}", f"hydra.sweeper.study_name={STUDY}", "~hydra.sweeper.arms.full"),
    *("finalists=none", "tracking=none"),
)


def sweep(folder: Path, n_trials: int, *arguments: str) -> list[FrozenTrial]:
    """Run a search with one thread, or extend it, to n_trials, and return its trials.

    Raises:
        subprocess.CalledProcessError: the program failed. Its words are in log.txt in the folder.
    """
    if len(done := trials(folder)) >= n_trials:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    words = (*COMMON, *arguments, f"hydra.sweeper.n_trials={n_trials}", "-m")
    with (folder / "log.txt").open("a") as log:
        subprocess.run(
            [sys.executable, "-m", "sweeper", *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=True,
        )
    return trials(folder)


def trials(folder: Path) -> list[FrozenTrial]:
    """Return the ended trials of a search that count, in the order in which they were asked."""
    database, name = folder / "outputs" / STUDY / "study.db", f"{STUDY}/lora"
    storage = f"sqlite:///{database}"
    if not database.exists() or name not in optuna.get_all_study_names(storage):
        return []
    study = optuna.load_study(study_name=name, storage=storage)
    return [trial for trial in study.get_trials() if counts(trial) and trial.state.is_finished()]
