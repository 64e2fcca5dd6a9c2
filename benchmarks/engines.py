"""The same trials by our engine, by a fresh process each, and by joblib's batches with a barrier.

    python benchmarks/engines.py [--trials 16] [--steps 64]

Sixteen fixed points of lr_rank_sweep on the embedded base, at the embedded default's own schedule.
Ours is the whole command from start to report, n_jobs=1 and 2. Against it: (a) a new process for each
trial, one or two at a time, and (b) what Hydra's joblib launcher does with two jobs: joblib runs two
trials, and the next two begin when both have ended. Nothing is pruned and nothing tracked anywhere,
threads are divided alike, and the other sides pay for nothing but loading and training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
from record import record

from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, validate
from sweeper.core.paths import TrialFolder

CORES = os.cpu_count() or 1
COMMON = ("tracking=none", "training.early_stopping_patience=null")
Point = dict[str, Any]


def draw_points(count: int) -> list[Point]:
    """Fixed points all over the main job's space, so that trials differ in length as they do there."""
    generator = random.Random(0)
    return [
        {
            "training.learning_rate": float(f"{10 ** generator.uniform(-3.3, -1.7):.3g}"),
            "adapter.r": generator.choice([2, 4, 8, 16, 32]),
            "adapter.alpha_over_r": generator.choice([1, 2, 4]),
            "adapter.target_modules": generator.choice(["attention", "mlp", "all-linear"]),
            "training.warmup_ratio": round(generator.uniform(0.0, 0.1), 3),
        }
        for _ in range(count)
    ]


def train(overrides: Sequence[str], folder: str, threads: int) -> None:
    """One trial as a script trains it: load, tokenize, train, save."""
    from sweeper.training.trial_runner import TransformersRunner

    settings = validate(RunSettings, compose(overrides).config)
    outcome = TransformersRunner(threads).run(
        settings.trial, TrialFolder(Path(folder)), {}, Silent()
    )
    assert outcome.cause == "finished", outcome


class Silent:
    """An observer that nothing reaches."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Nothing."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Nothing."""

    def stop_cause(self) -> None:
        """Never."""


def ours(points: list[Point], fixed: Sequence[str], root: Path, jobs: int) -> None:
    """The study: the points as priors, so that it asks for exactly them."""
    priors = ",".join(
        "{" + ",".join(f"{k}: {v}" for k, v in point.items()) + "}" for point in points
    )
    command = [
        *(sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", *fixed, "-m"),
        *("~hydra.sweeper.arms.full", "pruner=none", "sampler=random", "finalists=none"),
        *(f"hydra.sweeper.n_trials={len(points)}", f"hydra.sweeper.n_jobs={jobs}"),
        f"hydra.sweeper.priors=[{priors}]",
    ]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
    document = json.loads((root / "outputs/lr_rank_sweep/results.json").read_text())
    trials = document["arms"]["lora"]["trials"]
    assert [trial["cause"] for trial in trials] == ["finished"] * len(points)
    asked = sorted(json.dumps(point, sort_keys=True) for point in points)
    assert sorted(json.dumps(trial["params"], sort_keys=True) for trial in trials) == asked


def fresh(points: list[Point], fixed: Sequence[str], root: Path, jobs: int) -> None:
    """A new process for each trial, `jobs` at a time, the next as soon as one has ended."""

    def run(number: int) -> None:
        arguments = [_overrides(points[number], fixed), str(root / str(number)), CORES // jobs]
        command = [sys.executable, __file__, "--train", json.dumps(arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, range(len(points))))


def batches(points: list[Point], fixed: Sequence[str], root: Path, jobs: int) -> None:
    """joblib's processes stay, so imports are paid once; models are loaded anew; batches wait."""
    parallel = joblib.Parallel(n_jobs=jobs)
    for first in range(0, len(points), jobs):
        batch = range(first, min(first + jobs, len(points)))
        parallel(
            joblib.delayed(train)(
                _overrides(points[number], fixed), str(root / str(number)), CORES // jobs
            )
            for number in batch
        )


SIDES: dict[str, tuple[Callable[..., None], int]] = {
    "ours, n_jobs=1": (ours, 1),
    "fresh process each, one at a time": (fresh, 1),
    "ours, n_jobs=2": (ours, 2),
    "fresh process each, two at a time": (fresh, 2),
    "joblib, batches of two": (batches, 2),
}


def _overrides(point: Point, fixed: Sequence[str]) -> list[str]:
    return [*fixed, *(f"{key}={value}" for key, value in point.items())]


def main() -> None:
    """Every side once, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64, help="64 is the embedded default")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(*json.loads(asked.train))
        return
    points = draw_points(asked.trials)
    fixed = (*COMMON, f"training.max_steps={asked.steps}")
    seconds = {}
    for name, (side, jobs) in SIDES.items():
        with tempfile.TemporaryDirectory() as root:
            began = time.perf_counter()
            side(points, fixed, Path(root), jobs)
            seconds[name] = round(time.perf_counter() - began, 1)
            print(f"{name}: {seconds[name]} s", flush=True)
    one, two = seconds["ours, n_jobs=1"], seconds["ours, n_jobs=2"]
    ratios = {
        "fresh process each / ours, n_jobs=1": seconds["fresh process each, one at a time"] / one,
        "fresh process each / ours, n_jobs=2": seconds["fresh process each, two at a time"] / two,
        "joblib in batches / ours, n_jobs=2": seconds["joblib, batches of two"] / two,
        "ours, n_jobs=1 / n_jobs=2": one / two,
    }
    figures = {"trials": asked.trials, "steps a trial": asked.steps, "cores": CORES}
    ratios = {name: round(ratio, 2) for name, ratio in ratios.items()}
    record("engines", {**figures, "seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    main()
