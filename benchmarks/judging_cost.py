"""What does judging cost a trial, before and after looks had to have a reader?

    python benchmarks/judging_cost.py CHECKOUT_OF_BEFORE

CPU seconds of one thread on the embedded base: a trial of the real preset that is pruned at the first
rung that can decide, and a whole trial of the tiny preset. Each trial is the second of its worker. The
sides alternate, and the figures are medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROUNDS = 3
REAL = ("training=real", "evaluation=real", "evaluation.generation.max_new_tokens=48")
FIRST_RUNG = {"before": 0.35, "after": 0.25}
TRIALS: dict[str, tuple[tuple[str, ...], bool]] = {
    "real, pruned at its first rung": (REAL, True),
    "tiny, whole": (("training=tiny", "evaluation=tiny"), False),
}
"""Overrides, and whether the trial is pruned."""


class Pruner:
    """An observer that stops a trial at the first look at or past a fraction of its schedule."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._passed = False

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Ignore it."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Note whether the rung is passed. Intervals are rounded to steps."""
        self._passed |= step >= 0.97 * self._fraction * total_steps

    def stop_cause(self) -> str | None:
        """Return the driver's answer to the look."""
        return "pruned" if self._passed else None


def train(overrides: tuple[str, ...], fraction: float) -> dict[str, float]:
    """Train two trials in one worker, and return the costs of the second."""
    from sweeper.config.compose import compose
    from sweeper.config.settings import RunSettings, validate
    from sweeper.core.paths import TrialFolder
    from sweeper.training.trial_runner import TransformersRunner

    runner = TransformersRunner(threads=1)
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("warm", ("training.max_steps=1",)), ("measured", ())):
            config = compose([*overrides, "training.optim=adamw_torch", *more]).config
            settings = validate(RunSettings, config).trial
            outcome = runner.run(settings, TrialFolder(Path(folder) / name), {}, Pruner(fraction))
            metrics = outcome.metrics
    return {
        "training": metrics["cost/train_cpu_seconds"],
        "judging": metrics["cost/eval_cpu_seconds"],
        "trial": metrics["cost/cpu_seconds"],
    }


def measure(before: Path) -> dict[str, Any]:
    """Return the medians of all trials on both sides, and judging's share."""
    here = Path(__file__).parents[1]
    sides = {"before": before, "after": here}
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        trial: {side: [] for side in sides} for trial in TRIALS
    }
    for _ in range(ROUNDS):
        for trial in TRIALS:
            for side, root in sides.items():
                environment = {**os.environ, "PYTHONPATH": str(root)}
                command = [sys.executable, __file__, "--one", trial, side]
                text = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                ).stdout
                found[trial][side].append(json.loads(text.splitlines()[-1]))
    return {
        trial: {side: _medians(runs) for side, runs in of_side.items()}
        for trial, of_side in found.items()
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    share = 100 * medians["judging"] / medians["trial"]
    return {**{name: round(value, 2) for name, value in medians.items()}, "judging %": round(share)}


def main() -> None:
    """Measure one trial for the parent process, or all."""
    if sys.argv[1] == "--one":
        _, _, trial, side = sys.argv
        overrides, pruned = TRIALS[trial]
        print(json.dumps(train(overrides, FIRST_RUNG[side] if pruned else 2.0)))
        return
    from record import record

    record("judging_cost", measure(Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()
