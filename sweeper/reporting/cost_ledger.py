"""Cost tables: device time of search and finalists, the time that pruning saved, failures by cause."""

from __future__ import annotations

import statistics
from collections import Counter

from sweeper.core.outcome import Cause
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.text_table import DASH, TextTable, duration, number
from sweeper.reporting.verdict_doubts import label

FAILURES: tuple[Cause, ...] = ("oom", "diverged", "timeout", "crash", "error", "refused")
MESSAGE_CHARS = 160


def cost_sheet(results: StudyResults) -> TextTable:
    """Return one row per arm: trials by outcome, device time, and the time that pruning saved."""
    columns = (
        "method",
        "trials",
        "finished",
        "pruned",
        "failed",
        "search",
        "finalists",
        "device time",
        "saved by pruning",
    )
    rows = [_cost_row(arm) for arm in results.arms]
    return TextTable("Cost", columns, tuple(rows), frozenset({"method"}))


def saved_seconds(arm: ArmResult) -> float | None:
    """Return the device seconds that pruned trials would still have needed, or None if none is complete.

    Each pruned trial is continued at the same pace through the share of its own schedule that complete
    trials used: the median of their steps over their planned steps, below one if they stopped early.
    """
    complete = [trial for trial in arm.trials if trial.complete and trial.outcome.steps]
    if not complete:
        return None
    used = statistics.median(
        trial.outcome.steps / _planned_steps(trial, trial.outcome.steps) for trial in complete
    )
    usual = statistics.median(trial.outcome.steps / used for trial in complete)
    return sum(
        _training_seconds(trial)
        * max(0.0, used * _planned_steps(trial, usual) / trial.outcome.steps - 1)
        for trial in arm.trials
        if trial.outcome.cause == "pruned" and trial.outcome.steps
    )


def _planned_steps(trial: TrialResult, default: float) -> float:
    """Return the steps of a trial's own schedule, or the default if an older version stored none."""
    return trial.metric("training/total_steps") or default


def failure_sheet(results: StudyResults) -> TextTable | None:
    """Return one row per arm and cause of failure with the first message, or None if nothing failed."""
    rows = [
        (label(arm), cause, str(count), _message(arm, cause))
        for arm in results.arms
        for cause, count in Counter(trial.outcome.cause for trial in arm.trials).most_common()
        if cause in FAILURES
    ]
    if not rows:
        return None
    columns = ("method", "cause", "trials", "first message")
    return TextTable(
        "Failures", columns, tuple(rows), frozenset({"method", "cause", "first message"})
    )


def _cost_row(arm: ArmResult) -> tuple[str, ...]:
    ends = Counter(trial.outcome.cause for trial in arm.trials)
    failed = sum(ends[cause] for cause in FAILURES)
    saved = saved_seconds(arm) if ends["pruned"] else None
    # The share is that of the time which all trials of the search would have taken without pruning.
    share = None if not saved else 100 * saved / (saved + arm.seconds)
    further = arm.device_seconds - arm.seconds
    return (
        *(label(arm), str(len(arm.trials)), str(arm.finished), str(ends["pruned"]), str(failed)),
        duration(arm.seconds),
        duration(further) if further else DASH,
        duration(arm.device_seconds),
        DASH if saved is None else f"{duration(saved)} ({number(share or 0.0, '{:.0f} %')})",
    )


def _training_seconds(trial: TrialResult) -> float:
    # Loading happens once, so only training time is extrapolated.
    return trial.metric("cost/train_seconds") or trial.metric("cost/seconds") or 0.0


def _message(arm: ArmResult, cause: Cause) -> str:
    messages = (trial.outcome.message for trial in arm.trials if trial.outcome.cause == cause)
    first = next((message for message in messages if message), DASH).strip()
    # The last line of a traceback names the error.
    last_line = first.splitlines()[-1]
    return last_line[:MESSAGE_CHARS] + "…" * (len(last_line) > MESSAGE_CHARS)
