"""The report's figures: what a study found, drawn; or words that say why there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sweeper.config.settings import Objective, metric_words
from sweeper.reporting.baseline_doubts import RATE
from sweeper.reporting.chart import (
    SERIES,
    ChartAxis,
    ChartDot,
    ChartLine,
    bars,
    number_axis,
    parallel,
    plot,
    step_axis,
    word_axis,
)
from sweeper.reporting.rank_ladder import RankLadder, rank_ladders
from sweeper.reporting.report_evidence import EVALUATOR, FEWEST_TRIALS, ReportEvidence
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.study_progress import format_scalar
from sweeper.reporting.text_table import point_words
from sweeper.reporting.verdict import label

TARGETS = "adapter.target_modules"
TRAINABLE = "parameters/trainable"
MOST_CURVES = 60
"""Loss curves in one picture; beyond that nobody can follow one."""
MOST_MARKS = 1000
"""Dots in one picture, so that a page stays below its size."""
MOST_LINES = 300
"""Lines across parallel axes; beyond that they are a plane."""
FEW = 6
"""Different values of a setting that are marked one by one."""
BEST_SHARE, MOST_BEST = 0.1, 10
"""Of the trials, drawn in front across parallel axes: a tenth of them, and no more than ten."""


@dataclass(frozen=True)
class ReportFigure:
    """A picture and what it says; `svg` is None where there is nothing to draw."""

    title: str
    svg: str | None
    words: str
    wide: bool = False


def figures(results: StudyResults, evidence: ReportEvidence) -> list[ReportFigure]:
    """All figures of a study, in the order in which they are read."""
    return [
        rate_figure(results),
        curve_figure(results, evidence),
        *(rank_figure(ladder) for ladder in rank_ladders(results)),
        target_figure(results),
        pareto_figure(results),
        *(importance_figure(arm, evidence) for arm in results.arms if len(_varied(arm)) > 1),
        *(parallel_figure(arm) for arm in results.arms if len(_varied(arm)) > 1),
    ]


def rate_figure(results: StudyResults) -> ReportFigure:
    """Learning rate against loss, by arm."""
    title = "Learning rate against loss"
    measured = [
        (place, trial, rate, trial.value)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials[:MOST_MARKS]
        if trial.value is not None and isinstance(rate := trial.point.get(RATE), int | float)
    ]
    if len({rate for _, _, rate, _ in measured}) < 2:
        return ReportFigure(title, None, "No two trials were measured at different learning rates.")
    dots = [
        ChartDot(rate, loss, _words(trial), place, not trial.complete)
        for place, trial, rate, loss in measured
    ]
    axes = (
        number_axis("learning rate (log)", [dot.x for dot in dots], log=True),
        number_axis(f"best {_metric(results.objective)}", [dot.y for dot in dots]),
    )
    words = "One mark a trial; hollow marks were stopped early by the pruner."
    return ReportFigure(title, plot(title, words, axes, dots, legend=_names(results)), words)


def curve_figure(results: StudyResults, evidence: ReportEvidence) -> ReportFigure:
    """Evaluation loss over steps, with a cross where a trial was pruned."""
    title = "Loss curves"
    best = {(arm.name, arm.best.number) for arm in results.arms if arm.best is not None}
    trials = [
        (place, trial)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials
        if (arm.name, trial.number) in evidence.curves
    ]
    if not trials:
        return ReportFigure(title, None, "No trial's metrics.jsonl with an evaluation was found.")
    trials.sort(key=lambda found: found[1].value is None)  # of each arm the best come first
    lines = [
        ChartLine(
            evidence.curves[trial.arm, trial.number],
            _words(trial),
            place,
            strong=(trial.arm, trial.number) in best,
            cut=trial.outcome.cause == "pruned",
        )
        for place, trial in trials[:MOST_CURVES]
    ]
    points = [point for line in lines for point in line.points]
    axes = (
        number_axis("optimiser step", [0, *(step for step, _ in points)]),
        number_axis("eval loss", [loss for _, loss in points]),
    )
    words = "Thick: the best trial of each arm. A cross: the pruner stopped it there."
    if len(trials) > MOST_CURVES:
        words += f" Shown are the best {MOST_CURVES} of {len(trials)} trials."
    return ReportFigure(title, plot(title, words, axes, lines=lines, legend=_names(results)), words)


def rank_figure(ladder: RankLadder) -> ReportFigure:
    """What each rank brings: the best loss at each."""
    title = f"{ladder.arm}: loss by rank"
    points = [(float(rung.r), rung.value) for rung in ladder.rungs]
    axes = (
        step_axis("rank r (log)", [r for r, _ in points], log=True),
        number_axis(f"best {_metric(ladder.objective)}", [loss for _, loss in points]),
    )
    dots = [
        ChartDot(r, loss, f"r={r:g}: {loss:.4f} (best of {rung.trials})")
        for (r, loss), rung in zip(points, ladder.rungs, strict=True)
    ]
    lines = [ChartLine(tuple(points), "best loss by rank", strong=True)]
    return ReportFigure(title, plot(title, ladder.words, axes, dots, lines), ladder.words)


def target_figure(results: StudyResults) -> ReportFigure:
    """The objective by which modules got an adapter."""
    title = "Target modules"
    objective = results.objective
    measured = [
        (place, trial, str(trial.point[TARGETS]), trial.value)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials[:MOST_MARKS]
        if trial.complete and trial.value is not None and TARGETS in trial.point
    ]
    groups = list(dict.fromkeys(group for _, _, group, _ in measured))
    if len(groups) < 2:
        return ReportFigure(title, None, "No two choices of target modules have a finished trial.")
    best = {
        name: min((value for _, _, group, value in measured if group == name), key=objective.order)
        for name in groups
    }
    groups.sort(key=lambda name: objective.order(best[name]))
    dots = [
        ChartDot(groups.index(group), value, _words(trial), place)
        for place, trial, group, value in measured
    ]
    axes = (
        word_axis("target modules, the best first", groups),
        number_axis(f"best {_metric(objective)}", [dot.y for dot in dots]),
    )
    found = ", ".join(f"{name} {best[name]:.4f}" for name in groups)
    words = (
        f"Best {_metric(objective)} by choice, over all other settings: {found}. One mark a finished "
        "trial."
    )
    return ReportFigure(title, plot(title, words, axes, dots), words)


def pareto_figure(results: StudyResults) -> ReportFigure:
    """The objective against trainable parameters, and the trials that no other beats in both."""
    title = "Loss against trainable parameters"
    measured = [
        (place, trial, size, trial.value)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials[:MOST_MARKS]
        if trial.complete and trial.value is not None and (size := trial.metric(TRAINABLE))
    ]
    if len({size for _, _, size, _ in measured}) < 2:
        return ReportFigure(
            title, None, "No two finished trials differ in their trainable parameters."
        )
    dots = [ChartDot(size, loss, _words(trial), place) for place, trial, size, loss in measured]
    front = pareto([(dot.x, dot.y) for dot in dots], results.objective)
    axes = (
        number_axis("trainable parameters (log)", [dot.x for dot in dots], log=True),
        number_axis(f"best {_metric(results.objective)}", [dot.y for dot in dots]),
    )
    words = "The line joins the finished trials that no other beats in both: the Pareto front."
    lines = [ChartLine(tuple(front), "Pareto front", SERIES - 1, strong=True)]
    return ReportFigure(title, plot(title, words, axes, dots, lines, _names(results)), words)


def pareto(
    points: Sequence[tuple[float, float]], objective: Objective
) -> list[tuple[float, float]]:
    """The points of size and value that none is both smaller and better than, from left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda each: (each[0], objective.order(each[1]))):
        if not front or objective.gain(point[1], over=front[-1][1]) > 0:
            front.append(point)
    return front


def importance_figure(arm: ArmResult, evidence: ReportEvidence) -> ReportFigure:
    """How much each searched setting decides."""
    title = f"{arm.name}: which settings matter"
    shares = evidence.importances.get(arm.name)
    if shares is None:
        words = f"Left out: it needs the study's database and {FEWEST_TRIALS} finished trials."
        return ReportFigure(title, None, words)
    rows = [
        (key.rsplit("/", 1)[-1].rsplit(".", 1)[-1], share, f"{share:.0%}")
        for key, share in shares.items()
    ]
    words = f"Share of being among the best that a setting decides, by {EVALUATOR}."
    if len(arm.trials) < 50:
        words += f" From {len(arm.trials)} trials: a hint, no more."
    return ReportFigure(title, bars(title, words, rows), words)


def parallel_figure(arm: ArmResult) -> ReportFigure:
    """Every trial as a line across its settings to its loss."""
    title = f"{arm.name}: all settings at once"
    keys = _varied(arm)
    measured = [t for t in arm.trials if t.value is not None and set(keys) <= set(t.point)]
    trials = measured[:MOST_LINES]
    if len(trials) < 2:
        return ReportFigure(
            title, None, "Fewer than two trials were measured at every searched setting."
        )
    axes = [_axis(key, trials) for key in keys]
    axes.append(
        number_axis(
            _metric(arm.objective), [trial.value for trial in trials if trial.value is not None]
        )
    )
    places = [{word: place for place, word in axis.ticks} for axis in axes]
    count = min(MOST_BEST, max(1, round(BEST_SHARE * len(trials))))
    lines = []
    for rank, trial in enumerate(trials):
        points = [
            (index, _on_axis(trial.point[key], places[index], _is_number(key, trials)))
            for index, key in enumerate(keys)
        ]
        points.append((len(keys), trial.value or 0.0))
        lines.append(ChartLine(tuple(points), _words(trial), 0, strong=rank < count))
    best = "the best trial" if count == 1 else f"the best {count} trials"
    words = f"One line a trial, from its settings to its loss; thick: {best}."
    if len(measured) > MOST_LINES:
        words += f" Shown are the first {MOST_LINES} of {len(measured)} by rank."
    return ReportFigure(title, parallel(title, words, axes, lines), words, wide=True)


def _axis(key: str, trials: Sequence[TrialResult]) -> ChartAxis:
    name = key.rsplit(".", 1)[-1]
    values = [trial.point[key] for trial in trials]
    if not _is_number(key, trials):
        return word_axis(name, sorted({format_scalar(value) for value in values}))
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    wide = min(numbers) > 0 and max(numbers) / min(numbers) >= 8
    make = step_axis if len(set(numbers)) <= FEW else number_axis
    return make(name, numbers, log=wide)


def _is_number(key: str, trials: Sequence[TrialResult]) -> bool:
    return all(
        isinstance(trial.point[key], int | float) and not isinstance(trial.point[key], bool)
        for trial in trials
    )


def _on_axis(value: object, places: dict[str, float], number: bool) -> float:
    if number:
        assert isinstance(value, int | float)
        return float(value)
    assert value is None or isinstance(value, str | int | float)
    return places[format_scalar(value)]


def _varied(arm: ArmResult) -> list[str]:
    """The settings that differ between an arm's trials and that all of them have, in their order."""
    keys = dict.fromkeys(key for trial in arm.trials for key in trial.point)
    everywhere = [key for key in keys if all(key in trial.point for trial in arm.trials)]
    return [key for key in everywhere if len({trial.point[key] for trial in arm.trials}) > 1]


def _names(results: StudyResults) -> list[str]:
    return [label(arm) for arm in results.arms]


def _metric(objective: Objective) -> str:
    return metric_words(objective.metric)


def _words(trial: TrialResult) -> str:
    """The tooltip of a trial's mark."""
    loss = "" if trial.value is None else f" {trial.value:.4f},"
    return f"{trial.arm} {trial.number}:{loss} {trial.outcome.cause}; {point_words(trial.point)}"
