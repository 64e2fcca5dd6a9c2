"""The picture of the answer: base and arms on the test split, and how much the arms differ.

Each arm's interval is that of its change from the untuned base on the same examples. Whether two arms
differ is seen from the interval of their difference and not from whether their own intervals overlap, so
the difference has a panel of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from sweeper.config.settings import metric_words
from sweeper.reporting.arm_comparison import ArmComparison
from sweeper.reporting.chart import ChartRange, RangePanel, ranges
from sweeper.reporting.figures import ReportFigure
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.results import StudyResults
from sweeper.reporting.verdict import Verdict

UNTUNED = "untuned base"


def answer_picture(results: StudyResults, verdict: Verdict) -> ReportFigure | None:
    """Return the picture of a study's answer, or None if fewer than two models were judged."""
    panels = [] if not verdict.sides else [_models(results, verdict), *_differences(verdict)]
    if not panels:
        return None
    split = _split(verdict)
    title = f"The {split} split"
    rows = [row for panel in panels for row in panel.rows]
    description = "; ".join(f"{row.name}: {row.text}" for row in rows)
    return ReportFigure(title, ranges(title, description, panels), _caption(results, verdict))


def _split(verdict: Verdict) -> str:
    if verdict.duels:
        return verdict.duels[0].split
    return "validation" if verdict.sides[0].test_loss is None else "test"


def _models(results: StudyResults, verdict: Verdict) -> RangePanel:
    """Return the panel of the untuned base and of each arm."""
    split = _split(verdict)
    metric = metric_words(results.compared_metric if split == "test" else results.objective.metric)
    base, values = _values(verdict, split)
    changes = _changes(results)
    rows = [ChartRange(UNTUNED, base, f"{base:.4f}", series=len(values), hollow=True)]
    for series, (arm, label, value) in enumerate(values):
        found = changes.get(arm)
        ends: tuple[float | None, float | None] = (None, None)
        if found is not None and found.low is not None and found.high is not None:
            # The base is the common origin, so the interval of the change is drawn around the value.
            ends = found.low - found.value + value, found.high - found.value + value
        rows.append(ChartRange(label, value, f"{value:.4f}", *ends, series=series))
    name = metric.removeprefix("eval ")
    return RangePanel(f"{split} {name}", tuple(rows), base, UNTUNED)


def _values(verdict: Verdict, split: str) -> tuple[float, list[tuple[str, str, float]]]:
    """Return the base's value on a split, and name, label and value of each arm."""
    if not verdict.duels:
        side = verdict.sides[0]
        own, base = side.test_loss, side.untuned_test_loss
        if split == "test" and own is not None and base is not None:
            return base, [(side.arm, side.label, own)]
        return side.base_value, [(side.arm, side.label, side.value)]
    first = verdict.duels[0]
    found = [(duel.side.arm, duel.side.label, duel.values[0]) for duel in verdict.duels]
    reference = (first.reference.arm, first.reference.label, first.values[1])
    base = first.reference.base_value if first.base is None else first.base
    return base, [*found, reference]


def _changes(results: StudyResults) -> dict[str, IntervalEstimate]:
    """Return each arm's change from the untuned base on the test split, as far as it is stored."""
    found: dict[str, IntervalEstimate] = {}
    for each in results.decisive:
        if each.changes is not None:
            found |= dict(zip((each.arm, each.reference), each.changes, strict=True))
    return found


def _differences(verdict: Verdict) -> Iterator[RangePanel]:
    """Yield the panel of the arms' differences from their reference, if they have intervals."""
    duels = [duel for duel in verdict.duels if duel.difference.low is not None]
    if not duels:
        return
    unit = duels[0].objective.unit
    size = duels[0].evidence.margin_size
    yield RangePanel(
        f"minus {duels[0].reference.label}" + (f", in {unit}" if unit else ""),
        tuple(_difference(duel, series) for series, duel in enumerate(duels)),
        0.0,
        f"as good as {duels[0].reference.label}",
        None if size is None else (-size, size),
        "the margin within which a difference counts as none",
    )


def _difference(duel: ArmComparison, series: int) -> ChartRange:
    found = duel.difference
    return ChartRange(
        duel.side.label, found.value, f"{found.value:+.4f}", found.low, found.high, series
    )


def _caption(results: StudyResults, verdict: Verdict) -> str:
    if _split(verdict) != "test":
        return "The validation split chose the winners, so their values here have no interval."
    words = "Bars are 95 % intervals" if verdict.duels else "One arm has no difference to judge"
    if verdict.duels and not _changes(results):
        words = "The bar is the 95 % interval of the difference"
    elif verdict.duels:
        words += ": above, of each arm's change from the untuned base; below, of the difference"
    banded = any(duel.evidence.margin_size is not None for duel in verdict.duels)
    return f"{words}. The band is the margin of equivalence." if banded else f"{words}."
