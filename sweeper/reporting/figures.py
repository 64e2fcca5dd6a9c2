"""The report's figures, each with its caption, or with the reason why there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sweeper.config.settings import Objective, metric_words
from sweeper.reporting.baseline_doubts import RATE
from sweeper.reporting.best_of_n import best_of_n
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
from sweeper.reporting.report_evidence import EVALUATOR, FEWEST_TRIALS, SHUFFLES, ReportEvidence
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.study_progress import format_scalar
from sweeper.reporting.text_table import point_words
from sweeper.reporting.verdict_doubts import label

TARGETS = "adapter.target_modules"
TRAINABLE = "parameters/trainable"
MOST_CURVES = 60
"""Loss curves in one picture. With more of them no single curve can be followed."""
MOST_MARKS = 1000
"""Dots in one picture, which keeps a page below 2 MB."""
MOST_LINES = 300
"""Lines across parallel axes. More of them would merge into an area."""
MOST_COUNTS = 100
"""Numbers of trials of which the expected best is drawn."""
FEW = 6
"""Distinct values of a setting up to which each one gets a tick."""
CHANCE = f"more than one of {SHUFFLES} shufflings of the trials' values give as large an importance"
"""Condition under which an importance is not told apart from chance."""
BEST_SHARE, MOST_BEST = 0.1, 10
"""Share and largest number of the best trials that are drawn thick across parallel axes."""


@dataclass(frozen=True)
class ReportFigure:
    """A picture and its caption. `svg` is None if there is nothing to draw."""

    title: str
    svg: str | None
    caption: str
    wide: bool = False


def figures(results: StudyResults, evidence: ReportEvidence) -> list[ReportFigure]:
    """Return all figures of a study in reading order."""
    return [
        rate_figure(results),
        curve_figure(results, evidence),
        best_of_n_figure(results),
        *(rank_figure(ladder) for ladder in rank_ladders(results)),
        target_figure(results),
        pareto_figure(results),
        # With a single searched setting there is nothing to weigh.
        *(importance_figure(arm, evidence) for arm in results.arms if len(_varied(arm)) > 1),
        *(parallel_figure(arm) for arm in results.arms if len(_varied(arm)) > 1),
    ]


def rate_figure(results: StudyResults) -> ReportFigure:
    """Return the plot of the objective over the learning rate, by arm."""
    title = f"Learning rate against {_subject(results.objective)}"
    measured = [
        (place, trial, rate, trial.value)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials[:MOST_MARKS]
        if trial.value is not None and isinstance(rate := trial.params.get(RATE), int | float)
    ]
    # A chart over one learning rate has no axis to read.
    if len({rate for _, _, rate, _ in measured}) < 2:
        return ReportFigure(title, None, "All measured trials used the same learning rate.")
    dots = [
        ChartDot(rate, loss, _tooltip(trial), place, not trial.complete)
        for place, trial, rate, loss in measured
    ]
    axes = (
        number_axis("learning rate (log)", [dot.x for dot in dots], log=True),
        number_axis(f"best {_metric(results.objective)}", [dot.y for dot in dots]),
    )
    caption = (
        "One mark per trial. Hollow: stopped early by the pruner, with the value of its best look, "
        "which may be at a sample of the validation rows."
    )
    return ReportFigure(title, plot(title, caption, axes, dots, legend=_names(results)), caption)


def curve_figure(results: StudyResults, evidence: ReportEvidence) -> ReportFigure:
    """Return the plot of the evaluation loss over steps, with a cross where a trial was pruned."""
    title = "Loss curves"
    best = {(arm.name, arm.best.number) for arm in results.arms if arm.best is not None}
    trials = [
        (place, trial)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials
        if (arm.name, trial.number) in evidence.curves
    ]
    if not trials:
        return ReportFigure(
            title, None, "No metrics.jsonl with an evaluation was found in the trials' folders."
        )
    # Within an arm the best trials stay first, the sort is stable
    trials.sort(key=lambda found: found[1].value is None)
    lines = [
        ChartLine(
            evidence.curves[trial.arm, trial.number],
            _tooltip(trial),
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
    caption = "Thick: the best trial of each arm. Cross: the pruner stopped the trial there."
    # The caption states what is left out, or the picture would look complete.
    if len(trials) > MOST_CURVES:
        caption += f" The best {MOST_CURVES} of {len(trials)} trials are shown."
    return ReportFigure(
        title, plot(title, caption, axes, lines=lines, legend=_names(results)), caption
    )


def best_of_n_figure(results: StudyResults) -> ReportFigure:
    """Return the plot of the expected best of n trials over n, by arm."""
    title = "Best of n trials"
    searched = [(place, arm) for place, arm in enumerate(results.arms) if arm.adopted is None]
    curves = [(place, arm, best_of_n(arm, MOST_COUNTS)) for place, arm in searched]
    lines = [
        ChartLine(points, f"{label(arm)}: {points[-1][1]:.4f} of all {len(points)}", place, True)
        for place, arm, points in curves
        if len(points) > 1
    ]
    if not lines:
        return ReportFigure(title, None, "No arm has two trials with a value.")
    axes = (
        number_axis("trials", [x for line in lines for x, _ in line.points]),
        number_axis(
            f"expected best {_metric(results.objective)}",
            [y for line in lines for _, y in line.points],
        ),
    )
    caption = (
        "What a smaller search would have found, on average over all choices of n among the arm's "
        "trials. Compare arms at equal n."
    )
    return ReportFigure(
        title, plot(title, caption, axes, lines=lines, legend=_names(results)), caption
    )


def rank_figure(ladder: RankLadder) -> ReportFigure:
    """Return the plot of the best value at each rank."""
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
    lines = [ChartLine(tuple(points), f"best {_metric(ladder.objective)} by rank", strong=True)]
    return ReportFigure(title, plot(title, ladder.words, axes, dots, lines), ladder.words)


def target_figure(results: StudyResults) -> ReportFigure:
    """Return the plot of the objective by choice of target modules."""
    title = "Target modules"
    objective = results.objective
    measured = [
        (place, trial, str(trial.params[TARGETS]), trial.value)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials[:MOST_MARKS]
        if trial.complete and trial.value is not None and TARGETS in trial.params
    ]
    groups = sorted({group for _, _, group, _ in measured})
    if len(groups) < 2:
        return ReportFigure(
            title, None, "Fewer than two choices of target modules have a finished trial."
        )
    dots = [
        ChartDot(groups.index(group), value, _tooltip(trial), place)
        for place, trial, group, value in measured
    ]
    axes = (
        word_axis("target modules", groups),
        number_axis(f"best {_metric(objective)}", [dot.y for dot in dots]),
    )
    # Choices are tried at other rates and ranks, and unequally often, so their best trials rank none.
    caption = (
        "One mark per finished trial, at any values of the other settings. The search tries the choices "
        "unequally often, so the marks do not show which one is better."
    )
    return ReportFigure(title, plot(title, caption, axes, dots), caption)


def pareto_figure(results: StudyResults) -> ReportFigure:
    """Return the plot of the objective over trainable parameters, with the Pareto front."""
    subject = _subject(results.objective)
    title = f"{subject[0].upper()}{subject[1:]} against trainable parameters"
    measured = [
        (place, trial, size, trial.value)
        for place, arm in enumerate(results.arms)
        for trial in arm.trials[:MOST_MARKS]
        if trial.complete and trial.value is not None and (size := trial.metric(TRAINABLE))
    ]
    if len({size for _, _, size, _ in measured}) < 2:
        return ReportFigure(
            title, None, "All finished trials have the same number of trainable parameters."
        )
    dots = [ChartDot(size, loss, _tooltip(trial), place) for place, trial, size, loss in measured]
    front = pareto([(dot.x, dot.y) for dot in dots], results.objective)
    axes = (
        number_axis("trainable parameters (log)", [dot.x for dot in dots], log=True),
        number_axis(f"best {_metric(results.objective)}", [dot.y for dot in dots]),
    )
    caption = (
        "The line is the Pareto front: finished trials that no other trial beats in both respects."
    )
    lines = [ChartLine(tuple(front), "Pareto front", SERIES - 1, strong=True)]
    return ReportFigure(title, plot(title, caption, axes, dots, lines, _names(results)), caption)


def pareto(
    points: Sequence[tuple[float, float]], objective: Objective
) -> list[tuple[float, float]]:
    """Return the points (size, value) that no other point beats in both, sorted by size."""
    front: list[tuple[float, float]] = []
    # Of equal sizes the best value comes first, so that none of the others passes it.
    for point in sorted(set(points), key=lambda each: (each[0], objective.order(each[1]))):
        if not front or objective.gain(point[1], over=front[-1][1]) > 0:
            front.append(point)
    return front


def importance_figure(arm: ArmResult, evidence: ReportEvidence) -> ReportFigure:
    """Return the bar chart of each searched setting's importance."""
    title = f"{arm.name}: which settings matter"
    shares = evidence.importances.get(arm.name)
    if shares is None:
        caption = (
            f"Importances need the study's database and at least {FEWEST_TRIALS} finished trials."
        )
        return ReportFigure(title, None, caption)
    if not shares:
        return ReportFigure(title, None, f"No setting is shown to matter: {CHANCE}.")
    rows = [
        (key.rsplit("/", 1)[-1].rsplit(".", 1)[-1], share, f"{share:.0%}")
        for key, share in shares.items()
    ]
    caption = (
        f"Share that a setting has in being among the best trials, by {EVALUATOR}. Settings are left "
        f"out if {CHANCE}."
    )
    return ReportFigure(title, bars(title, caption, rows), caption)


def parallel_figure(arm: ArmResult) -> ReportFigure:
    """Return the parallel plot with one line per trial, across its settings to its value."""
    title = f"{arm.name}: all settings at once"
    keys = _varied(arm)
    measured = [t for t in arm.trials if t.value is not None and set(keys) <= set(t.params)]
    trials = measured[:MOST_LINES]
    if len(trials) < 2:
        return ReportFigure(
            title, None, "Fewer than two trials have a value and all searched settings."
        )
    axes = [_axis(key, trials) for key in keys]
    axes.append(
        number_axis(
            _metric(arm.objective), [trial.value for trial in trials if trial.value is not None]
        )
    )
    places = [{word: place for place, word in axis.ticks} for axis in axes]
    # At least one line is thick, even of two trials.
    count = min(MOST_BEST, max(1, round(BEST_SHARE * len(trials))))
    lines = []
    for rank, trial in enumerate(trials):
        points = [
            (index, _on_axis(trial.params[key], places[index], _is_number(key, trials)))
            for index, key in enumerate(keys)
        ]
        points.append((len(keys), trial.value or 0.0))
        lines.append(ChartLine(tuple(points), _tooltip(trial), 0, strong=rank < count))
    best = "the best trial" if count == 1 else f"the best {count} trials"
    caption = (
        f"One line per trial, from its settings to its {_metric(arm.objective)}. Thick: {best}."
    )
    if len(measured) > MOST_LINES:
        caption += f" The best {MOST_LINES} of {len(measured)} trials are shown."
    return ReportFigure(title, parallel(title, caption, axes, lines), caption, wide=True)


def _axis(key: str, trials: Sequence[TrialResult]) -> ChartAxis:
    name = key.rsplit(".", 1)[-1]
    values = [trial.params[key] for trial in trials]
    if not _is_number(key, trials):
        return word_axis(name, sorted({format_scalar(value) for value in values}))
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    # Rates and ranks span decades, and a linear axis would crowd all small values together.
    wide = min(numbers) > 0 and max(numbers) / min(numbers) >= 8
    make = step_axis if len(set(numbers)) <= FEW else number_axis
    return make(name, numbers, log=wide)


def _is_number(key: str, trials: Sequence[TrialResult]) -> bool:
    return all(
        # bool is a subclass of int in Python.
        isinstance(trial.params[key], int | float) and not isinstance(trial.params[key], bool)
        for trial in trials
    )


def _on_axis(value: object, places: dict[str, float], number: bool) -> float:
    if number:
        assert isinstance(value, int | float)
        return float(value)
    assert value is None or isinstance(value, str | int | float)
    return places[format_scalar(value)]


def _varied(arm: ArmResult) -> list[str]:
    """Return the settings that all trials of an arm have and that differ between them."""
    keys = dict.fromkeys(key for trial in arm.trials for key in trial.params)
    # A key of a conditional branch is missing from some trials, whose lines would have gaps.
    everywhere = [key for key in keys if all(key in trial.params for trial in arm.trials)]
    return [key for key in everywhere if len({trial.params[key] for trial in arm.trials}) > 1]


def _names(results: StudyResults) -> list[str]:
    return [label(arm) for arm in results.arms]


def _metric(objective: Objective) -> str:
    return metric_words(objective.metric)


def _subject(objective: Objective) -> str:
    """Return the objective as a title calls it: loss, or eval rougeL."""
    return "loss" if objective.metric == "eval/loss" else _metric(objective)


def _tooltip(trial: TrialResult) -> str:
    """Return the tooltip of a trial's mark."""
    loss = "" if trial.value is None else f" {trial.value:.4f},"
    return f"{trial.arm} {trial.number}:{loss} {trial.outcome.ending}; {point_words(trial.params)}"
