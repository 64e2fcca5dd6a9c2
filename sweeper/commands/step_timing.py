"""Time a few steps of trials, in a process of its own, for the forecast of a dry run.

`python -m sweeper.commands.step_timing THREADS` reads a JSON list of trial settings from stdin
and prints a list of timings. Each trial is really trained for a few steps in a temporary folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sweeper.commands.data_report import prepared_rows
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import SweeperError
from sweeper.core.outcome import StopCause, TrialTiming
from sweeper.core.paths import TrialFolder
from sweeper.core.signals import exit_with_parent
from sweeper.modeling.hardware import device, device_report
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.schedule import look_steps, plan_schedule
from sweeper.training.trial_runner import TransformersRunner

STEPS = 4
"""Steps that are taken. The first one is much slower than the others, so that these are timed."""


ALL_THREADS = 10_000
"""More CPU threads than any machine has: torch's own number is used."""


class StepClock:
    """An observer that notes when each step ends, and neither reports nor stops a trial."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: list[float] = []

    @property
    def step_s(self) -> float:
        """Seconds of a step, without the first one, which prepares what all others use."""
        first, *_, last = self._ends[:STEPS]
        return (last - first) / (STEPS - 1)

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Do nothing."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Do nothing."""

    def stop_cause(self) -> StopCause | None:
        """Return None. A trial asks at the end of every step, and after an evaluation."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the host is ahead of the device
        self._ends.append(self._clock())
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
    clock = StepClock()
    with tempfile.TemporaryDirectory(prefix="sweeper-timing-") as place:
        runner = TransformersRunner(threads)
        outcome = runner.run(shortened(settings), TrialFolder(Path(place)), {}, clock)
    if outcome.cause not in ("finished", "early_stopped"):
        return facts.model_copy(update={"problem": f"{outcome.cause}: {outcome.message}"})
    seconds = _seconds(settings, rows["validation"], outcome.metrics)
    setup_s = max(0.0, outcome.metrics["cost/train_seconds"] - STEPS * clock.step_s)
    return facts.model_copy(update={**seconds, "step_s": clock.step_s, "setup_s": setup_s})


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
    """Return the seconds of a look, of the last judgement and of everything that is once."""
    # A look at a sample is followed by a judgement of the whole split
    sample = min(settings.evaluation.look_rows or judged, judged)
    once = 0 if sample == judged else judged
    row_s = metrics["cost/eval_seconds"] / max(1, sample + once)
    return {
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


def timings(documents: Sequence[Mapping[str, Any]], threads: int) -> list[TrialTiming]:
    """Return the timing of each trial. The first one's start includes that of this process."""
    # A worker of the study loads the same libraries. Their CPU seconds do not depend on other programs
    imported_s = time.process_time()
    found = [timing_or_problem(document, threads) for document in documents]
    if found and found[0].start_s is not None:
        found[0] = found[0].model_copy(update={"start_s": found[0].start_s + imported_s})
    return found


if __name__ == "__main__":
    exit_with_parent()
    print(
        json.dumps([each.model_dump() for each in timings(json.load(sys.stdin), int(sys.argv[1]))])
    )
