"""The ledger: what a study's trials cost, what pruning saved, and what failed of which cause."""

from __future__ import annotations

import statistics
from collections import Counter

from sweeper.core.outcome import Cause
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.text_table import DASH, TextTable, duration, number
from sweeper.reporting.verdict import label

FAILURES: tuple[Cause, ...] = ("oom", "diverged", "timeout", "crash", "error", "refused")
MESSAGE_CHARS = 160


def cost_sheet(results: StudyResults) -> TextTable:
    """One row an arm: device time by what became of it, and what pruning saved."""
    columns = (
        "method",
        "trials",
        "finished",
        "pruned",
        "failed",
        "device time",
        "saved by pruning",
    )
    rows = [_cost_row(arm) for arm in results.arms]
    return TextTable("What it cost", columns, tuple(rows), frozenset({"method"}))


def saved_seconds(arm: ArmResult) -> float | None:
    """Device seconds that the pruned trials would still have taken; None without one to go by.

    A pruned trial is taken to go on at its own pace for as many steps as the median finished trial had:
    its training seconds · (steps of a finished trial - its steps) / its steps.
    """
    steps = [trial.outcome.steps for trial in arm.trials if trial.outcome.cause == "finished"]
    if not steps:
        return None
    whole = statistics.median(steps)
    return sum(
        _training_seconds(trial) * max(0.0, whole - trial.outcome.steps) / trial.outcome.steps
        for trial in arm.trials
        if trial.outcome.cause == "pruned" and trial.outcome.steps
    )


def failure_sheet(results: StudyResults) -> TextTable | None:
    """One row for each arm and cause of failure, with the first message; None if nothing failed."""
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
        "What failed", columns, tuple(rows), frozenset({"method", "cause", "first message"})
    )


def _cost_row(arm: ArmResult) -> tuple[str, ...]:
    ends = Counter(trial.outcome.cause for trial in arm.trials)
    failed = sum(ends[cause] for cause in FAILURES)
    saved = saved_seconds(arm) if ends["pruned"] else None
    share = None if not saved else 100 * saved / (saved + arm.seconds)
    return (
        *(label(arm), str(len(arm.trials)), str(arm.finished), str(ends["pruned"]), str(failed)),
        duration(arm.seconds),
        DASH if saved is None else f"{duration(saved)} ({number(share or 0.0, '{:.0f} %')})",
    )


def _training_seconds(trial: TrialResult) -> float:
    return trial.metric("cost/train_seconds") or trial.metric("cost/seconds") or 0.0


def _message(arm: ArmResult, cause: Cause) -> str:
    messages = (trial.outcome.message for trial in arm.trials if trial.outcome.cause == cause)
    first = next((message for message in messages if message), DASH).strip()
    last_line = first.splitlines()[-1]
    return last_line[:MESSAGE_CHARS] + "…" * (len(last_line) > MESSAGE_CHARS)
