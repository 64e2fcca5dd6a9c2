"""What the default search is worth on the embedded default: against random search, and unpruned.

Three searches with the same number of training steps, five seeds of the sampler each, all by the
program's own command line:

    random     points drawn uniformly, every trial to its own end: the yardstick
    unpruned   the default sampler, every trial to its own end
    default    the default sampler and the default pruner

The seed of training stays, so that a point is worth the same in every search; what varies is what is
asked. The default sampler's first trials are random draws anyway: they are made once per seed and the
study's folder is copied, so that the three searches of a seed start alike (and nothing is trained
three times). There are no priors (conf/space/tiny.yaml has none), so none is told apart.

The two searches without pruning run under `pruner.audit_fraction=1.0`: their trials go on where the
default pruner would have stopped them, which changes nothing that a sampler is told and counts the
wrong kills. The default search gets more trials until it has spent the others' steps.

    python benchmarks/search_quality.py [FOLDER [SEARCHES AT ONCE]]

An hour on one core; started again it goes on where it was stopped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

STUDY = "lr_rank_sweep"
COMMON = (
    *(f"+experiment={STUDY}", "~hydra.sweeper.arms.full", "finalists=none", "tracking=none"),
    *("training.max_steps=32", "training.per_device_train_batch_size=8"),
    "evaluation.max_samples=111",
)
SEARCHES = {
    "random": ("sampler=random", "pruner=median", "pruner.audit_fraction=1.0"),
    "unpruned": ("sampler=tpe", "pruner=median", "pruner.audit_fraction=1.0"),
    "default": ("sampler=tpe", "pruner=median"),
}
SEEDS = (0, 100, 200, 300, 400)
"""Far apart: a resumed study's sampler adds the number of values drawn so far."""
N_TRIALS = 12
"""The experiment's own."""
START = 4
"""How many of them the default sampler draws at random (conf/sampler/tpe.yaml)."""


def sweep(folder: Path, seed: int, n_trials: int, arguments: tuple[str, ...]) -> list[FrozenTrial]:
    """Run a search, or extend it, to n_trials; at once where it has them."""
    if len(done := trials(folder)) >= n_trials:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    words = (*arguments, f"sampler.seed={seed}", f"hydra.sweeper.n_trials={n_trials}", "-m")
    with (folder / "log.txt").open("a") as log:
        subprocess.run(
            [sys.executable, "-m", "sweeper", *COMMON, *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=True,
        )
    return trials(folder)


def trials(folder: Path) -> list[FrozenTrial]:
    """The trials of a search that ended, in the order they were asked."""
    database = folder / "outputs" / STUDY / "study.db"
    if not database.exists():
        return []
    study = optuna.load_study(study_name=f"{STUDY}/lora", storage=f"sqlite:///{database}")
    return [trial for trial in study.get_trials() if trial.state.is_finished()]


def steps(trial: FrozenTrial) -> int:
    """Optimiser steps that a trial was trained."""
    return int(trial.user_attrs["outcome"]["steps"])


def run_seed(root: Path, seed: int) -> dict[str, list[FrozenTrial]]:
    """The three searches from one start."""
    start = root / f"seed_{seed}" / "start"
    sweep(start, seed, START, SEARCHES["random"])
    found = {}
    for name, arguments in SEARCHES.items():
        folder = start.with_name(name)
        if not folder.exists():
            copy = start.with_name("copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(start, copy)
            copy.rename(folder)
        found[name] = sweep(folder, seed, N_TRIALS, arguments)
    budget = sum(map(steps, found["unpruned"]))
    while (spent := sum(map(steps, found["default"]))) < budget:
        more = -(-(budget - spent) // max(map(steps, found["default"])))
        found["default"] = sweep(
            start.with_name("default"), seed, len(found["default"]) + more, SEARCHES["default"]
        )
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/search_quality").resolve()
    with ThreadPoolExecutor(int(sys.argv[2]) if len(sys.argv) > 2 else 1) as pool:
        list(pool.map(partial(run_seed, root), SEEDS))
