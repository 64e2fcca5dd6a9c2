"""Time a few steps of trials, in a process of its own, for the forecast of a dry run.

`python -m sweeper.commands.step_timing THREADS` reads a JSON list of trial settings from stdin
and prints a list of timings. Each trial is really trained for a few steps in a temporary folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeper.commands.data_report import prepared_rows
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import SweeperError
from sweeper.core.outcome import StopCause, TrialTiming
from sweeper.core.paths import TrialFolder
from sweeper.modeling.hardware import device, device_report
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.schedule import look_steps, plan_schedule
from sweeper.training.trial_runner import TransformersRunner

STEPS = 4
"""Steps that are timed. The first one is a little slower than the others."""


ALL_THREADS = 10_000
"""More CPU threads than any machine has: torch's own number is used."""


class SilentObserver:
    """An observer that neither reports nor stops a trial."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Do nothing."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Do nothing."""

    def stop_cause(self) -> StopCause | None:
        """Return None."""
        return None


def time_trial(settings: TrialSettings, threads: int = ALL_THREADS) -> TrialTiming:
    """Return the data in numbers, the schedule, and seconds by part of one trial.

    Raises:
        SweeperError: the data or the model cannot be used.
    """
    prepared = prepared_rows(settings)
    rows = {name: len(split.rows) for name, split in prepared.encoded.items()}
    schedule = plan_schedule(settings.training, rows["train"])
    free = device_report(device()).free_mib
    facts = TrialTiming(
        source=prepared.splits.source,
        rows=rows,
        dropped=prepared.dropped,
        unread=prepared.splits.unread,
        steps=schedule.total_steps,
        looks=len(look_steps(schedule)),
        free_mib=free,
    )
    need = estimate_trial(settings, device(), length=prepared.train.max_length).total
    if need is not None and need > free:
        return facts.model_copy(update={"need_mib": need})
    with tempfile.TemporaryDirectory(prefix="sweeper-timing-") as place:
        runner = TransformersRunner(threads)
        outcome = runner.run(shortened(settings), TrialFolder(Path(place)), {}, SilentObserver())
    if outcome.cause not in ("finished", "early_stopped"):
        return facts.model_copy(update={"problem": f"{outcome.cause}: {outcome.message}"})
    return facts.model_copy(update=_seconds(settings, rows["validation"], outcome.metrics))


def shortened(settings: TrialSettings) -> TrialSettings:
    """Return a trial of a few steps with one look at the validation split, and no prompts."""
    schedule = {
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "eval_delay": 0.0,
        "save_steps": None,
        "logging_steps": STEPS,
    }
    training = settings.training.model_copy(
        update={**schedule, "warmup_steps": None, "warmup_ratio": 0.0}
    )
    evaluation = settings.evaluation.model_copy(update={"prompts": []})
    artifacts = settings.artifacts.model_copy(update={"merged": False, "zip": False})
    parts = {"training": training, "evaluation": evaluation, "artifacts": artifacts}
    return settings.model_copy(update=parts)


def _seconds(
    settings: TrialSettings, judged: int, metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return the seconds of a step, of a look, of the last judgement and of everything that is once."""
    # A look at a sample is followed by a judgement of the whole split
    sample = min(settings.evaluation.look_rows or judged, judged)
    once = 0 if sample == judged else judged
    row_s = metrics["cost/eval_seconds"] / max(1, sample + once)
    return {
        "step_s": metrics["cost/train_seconds"] / STEPS,
        "look_s": row_s * sample,
        "judgement_s": row_s * once,
        "row_s": row_s,
        "save_s": metrics["cost/save_seconds"],
        "start_s": metrics["cost/load_seconds"] + metrics["cost/data_seconds"],
        "need_mib": metrics["cost/peak_memory_mib"],
    }


def timing_or_problem(document: Mapping[str, Any], threads: int = ALL_THREADS) -> TrialTiming:
    """Return the timing of a trial's settings, or the reason for its absence under `problem`."""
    try:
        return time_trial(TrialSettings.model_validate(document), threads)
    except SweeperError as error:
        return TrialTiming(problem=str(error))


if __name__ == "__main__":
    timings = [timing_or_problem(document, int(sys.argv[1])) for document in json.load(sys.stdin)]
    print(json.dumps([timing.model_dump() for timing in timings]))
