"""Time a few steps of trials, in a process of its own, for the forecast of a dry run.

`python -m sweeper.commands.step_timing THREADS` reads a JSON list of trial settings from stdin. It
prints words on what is being timed, and a list of timings, each as a line of JSON. Each trial is really
trained for a few steps in a temporary folder.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sweeper.commands.data_report import prepared_rows
from sweeper.commands.timed_trial import STEPS, TimedTrial
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import SweeperError
from sweeper.core.outcome import StopCause, TrialTiming
from sweeper.core.paths import TrialFolder
from sweeper.core.signals import exit_with_parent
from sweeper.core.spool import read_spool
from sweeper.core.stage_words import StageListener, heard_by
from sweeper.modeling.hardware import device, device_report
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.schedule import look_steps, plan_schedule
from sweeper.training.trial_runner import TransformersRunner

ENOUGH_SECONDS = 10.0
"""Seconds after the first step at which the timing ends with the next look. A judgement: the tokens of
two steps of 16 rows differ by a tenth, and a slow machine should not take six steps."""
ALL_THREADS = 10_000
"""More CPU threads than any machine has: torch's own number is used."""


class StepClock:
    """An observer that notes when each step ends, and stops the trial at a look."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: list[float] = []
        self._before_looks: list[int] = []
        """Numbers of the steps, from 0, that a look followed."""
        self._looked = False

    @property
    def steps(self) -> int:
        """Number of steps that were taken."""
        return len(self._ends)

    @property
    def step_s(self) -> float:
        """Seconds of a step, without the first one, which prepares what all others use."""
        # a step after a look would include the look and its checkpoint
        taken = [
            end - begin
            for step, (begin, end) in enumerate(pairwise(self._ends))
            if step not in self._before_looks
        ]
        return math.fsum(taken) / len(taken)

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Do nothing."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Note a look."""
        self._before_looks.append(self.steps - 1)
        self._looked = True

    def stop_cause(self) -> StopCause | None:
        """Note the end of a step, or return a cause after a look if enough steps were timed.

        A trial asks at the end of every step, and after a look.
        """
        if self._looked:
            self._looked = False
            enough = self.steps >= STEPS or self._ends[-1] - self._ends[0] >= ENOUGH_SECONDS
            # A pruned trial is not judged on the whole split, and writes no answers at its end
            return "pruned" if enough else None
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
    timed = TimedTrial(settings, prepared, schedule)
    free = device_report(device()).free_mib
    facts = TrialTiming(
        source=prepared.splits.source,
        rows=rows,
        windows=len(timed.general),
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
        runner, folder = TransformersRunner(threads), TrialFolder(Path(place))
        outcome = runner.run(timed.shortened, folder, {}, clock)
        if outcome.cause != "pruned":  # by the clock
            problem = f"{outcome.cause}: {outcome.message}"
            return facts.model_copy(update={"problem": problem})
        metrics = outcome.metrics
        seconds = timed.seconds(metrics, read_spool(folder.metrics), clock.step_s)
    share = metrics["cost/train_cpu_seconds"] / max(metrics["cost/train_seconds"], 1e-9)
    on_cpu = device().type == "cpu"
    return facts.model_copy(update={**seconds, "cpu_share": share if on_cpu else None})


def timing_or_problem(document: Mapping[str, Any], threads: int = ALL_THREADS) -> TrialTiming:
    """Return the timing of a trial's settings, or the reason for its absence under `problem`."""
    try:
        return time_trial(TrialSettings.model_validate(document), threads)
    except SweeperError as error:
        return TrialTiming(problem=str(error))


def timings(
    documents: Sequence[Mapping[str, Any]], threads: int, tell: Callable[[str], None]
) -> list[TrialTiming]:
    """Return the timing of each trial. The first one's start includes that of this process.

    Args:
        documents: settings of the trials.
        threads: CPU threads of a worker of the study.
        tell: receives words on what is being timed.
    """
    if any(each["evaluation"]["generation"]["num_examples"] for each in documents):
        # as a worker imports it, once and not in the time of the first answers
        import sweeper.evaluation.rouge  # noqa: F401
    # A worker of the study loads the same libraries. Their CPU seconds do not depend on other programs
    imported_s = time.process_time()
    found = []
    for number, document in enumerate(documents, start=1):
        place = f"trial {number} of {len(documents)}: " if len(documents) > 1 else ""
        with heard_by(StageListener(partial(_tell_at, place, tell))):
            found.append(timing_or_problem(document, threads))
    if found and found[0].start_s is not None:
        found[0] = found[0].model_copy(update={"start_s": found[0].start_s + imported_s})
    return found


def _tell_at(place: str, tell: Callable[[str], None], words: str) -> None:
    tell(place + words)


def _print_line(document: object) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    exit_with_parent()
    timed_trials = timings(json.load(sys.stdin), int(sys.argv[1]), _print_line)
    _print_line([each.model_dump() for each in timed_trials])
