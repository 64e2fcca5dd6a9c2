"""The status of running and past studies as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from sweeper.config.settings import metric_words
from sweeper.reporting.console import say
from sweeper.reporting.study_status import ENDED, ArmStatus, StudyStatus, TrialStatus
from sweeper.reporting.text_table import DASH, TextTable, number, point_words

MAX_QUEUE = 10


def status_sheet(statuses: Sequence[StudyStatus], title: str) -> TextTable:
    """Return one row per study."""
    return TextTable(
        title,
        ("study", "state", "trials", "ended as", "best", "metric", "budget left"),
        tuple(_study_row(found) for found in statuses),
        frozenset({"study", "state", "ended as", "metric", "budget left"}),
        ("metric", "ended as", "budget left"),
    )


def print_status(found: StudyStatus, console: Console) -> None:
    """Print the status of one study: its arms, open trials and queues."""
    say(console, f"{found.study_name}: {found.state}, {_driver(found)}")
    if found.left and found.state not in ENDED:
        say(console, f"budget left: {found.left}")
    console.print(_arms_sheet(found).draw())
    for arm in found.arms:
        if arm.best is not None:
            say(
                console,
                f"best of {arm.name}: trial {arm.best.trial}, {point_words(arm.best.point)}",
            )
    if found.running:
        console.print(_running_sheet(found).draw())
    for arm in found.arms:
        for line in _queue(arm):
            say(console, line)
    if found.state in ENDED:
        say(console, f"Start again  python -m sweeper {found.command}")


def _driver(found: StudyStatus) -> str:
    # The process of an ended study is gone, and its number may belong to another one.
    begun = "last started" if found.state in ENDED else "since"
    return f"{begun} {found.since} (process {found.process} on {found.host})"


def _study_row(found: StudyStatus) -> tuple[str, ...]:
    causes: dict[str, int] = {}
    for arm in found.arms:
        for cause, count in arm.trials.items():
            causes[cause] = causes.get(cause, 0) + count
    # The first arm is the one that users search, others are baselines.
    best = found.arms[0].best
    return (
        found.study_name,
        found.state,
        f"{sum(arm.done for arm in found.arms)} of {sum(arm.wanted for arm in found.arms)}",
        _causes(causes),
        _value(best),
        metric_words(found.objective.metric),
        DASH if found.state in ENDED or not found.left else found.left,
    )


def _arms_sheet(found: StudyStatus) -> TextTable:
    rows = tuple(
        (
            arm.name,
            f"{arm.done} of {arm.wanted}",
            _causes(arm.trials),
            _value(arm.best),
        )
        for arm in found.arms
    )
    columns = ("arm", "trials", "ended as", f"best {metric_words(found.objective.metric)}")
    return TextTable("Arms", columns, rows, frozenset({"arm", "ended as"}))


def _running_sheet(found: StudyStatus) -> TextTable:
    rows = tuple(
        (
            trial.trial,
            trial.state,
            _progress(trial),
            _value(trial),
            point_words(trial.point),
        )
        for trial in found.running
    )
    columns = ("trial", "state", "step", "value", "settings")
    return TextTable("Open trials", columns, rows, frozenset({"trial", "state", "settings"}))


def _queue(arm: ArmStatus) -> list[str]:
    if not arm.queue:
        return []
    lines = [f"queued in arm {arm.name}, in this order:"]
    lines += [f"    {point_words(point)}" for point in arm.queue[:MAX_QUEUE]]
    # A grid may queue hundreds of points.
    more = len(arm.queue) - MAX_QUEUE
    return lines + ([f"    and {more} more"] if more > 0 else [])


def _value(trial: TrialStatus | None) -> str:
    return number(None if trial is None else trial.value, "{:.4f}")


def _progress(trial: TrialStatus) -> str:
    # The length of a trial is known only after its data are loaded.
    return f"{trial.step} of {trial.total_steps}" if trial.total_steps else DASH


def _causes(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in causes.items()) or DASH
