"""How much cheaper is a trial whose batches have no padding, and does it end at the same value?

CPU seconds of one thread for the start of a trial on the embedded base, padded and without padding in
turn. A warm trial of each kind comes first and is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from record import record

from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, validate
from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.modeling import base_model
from sweeper.training.trial_runner import TransformersRunner

TRIALS = {"lora": [], "full": ["adapter=none", "quantization=none"]}
STEPS = ("training.max_steps=12", "training.eval_steps=6")
ROUNDS = 3
STAGES = ("train", "eval")


class SilentObserver:
    """An observer that never stops a trial."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Ignore a step."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Ignore an evaluation."""

    def stop_cause(self) -> None:
        """Return None."""


@contextmanager
def padded() -> Iterator[None]:
    """Let every model that is loaded need padded batches."""
    proof = base_model.padding_obstacle
    base_model.padding_obstacle = lambda model: "this side of the benchmark pads"
    try:
        yield
    finally:
        base_model.padding_obstacle = proof


def run(runner: TransformersRunner, folder: Path, overrides: list[str]) -> Outcome:
    """Train and judge the trial once."""
    settings = validate(RunSettings, compose([*STEPS, *overrides]).config).trial
    outcome = runner.run(settings, TrialFolder(folder), {}, SilentObserver())
    assert outcome.best_value is not None, outcome.message
    return outcome


def compare(root: Path, overrides: list[str]) -> dict[str, Any]:
    """Run both sides alternately and return their CPU seconds, ratios and best values."""
    # A base stays as it was loaded, so each side has its own runner
    sides = {"padded": TransformersRunner(threads=1), "without padding": TransformersRunner(1)}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in sides}
    number = count()
    for _ in range(ROUNDS + 1):
        for name, runner in sides.items():
            with padded() if name == "padded" else nullcontext():
                outcomes[name].append(run(runner, root / str(next(number)), overrides))
    counted = {name: found[1:] for name, found in outcomes.items()}
    seconds = {
        name: {
            stage: [round(one.metrics[f"cost/{stage}_cpu_seconds"], 2) for one in found]
            for stage in STAGES
        }
        for name, found in counted.items()
    }
    medians = {
        stage: [statistics.median(side[stage]) for side in seconds.values()] for stage in STAGES
    }
    values = {name: found[0].best_value for name, found in counted.items()}
    return {
        "CPU seconds": seconds,
        "ratio of medians": {name: round(a / b, 2) for name, (a, b) in medians.items()},
        "best value": values,
    }


def main() -> None:
    """Measure one LoRA trial and one full fine-tune of the default experiment."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: compare(Path(folder) / name, own) for name, own in TRIALS.items()}
    record("padding_free", figures)


if __name__ == "__main__":
    main()
