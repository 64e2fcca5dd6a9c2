"""Charts: where things are drawn, and that words in them stay words."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from sweeper.config.settings import Objective
from sweeper.reporting.chart import (
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
from sweeper.reporting.figures import (
    TARGETS,
    TRAINABLE,
    pareto,
    pareto_figure,
    rate_figure,
    target_figure,
)
from sweeper.reporting.results import StudyResults
from tests.reporting.studies import (
    FACTS,
    LOSS,
    ROUGE,
    ROUGE_FACTS,
    make_arm,
    make_results,
    make_trial,
)

SVG = "{http://www.w3.org/2000/svg}"


def test_linear_axis_has_round_ticks_inside() -> None:
    """Every value has a place between 0 and 1, and the ticks are 1, 2 or 5 times a power of ten."""
    axis = number_axis("loss", [3.54, 4.26])
    assert [words for _, words in axis.ticks] == ["3.6", "3.8", "4.0", "4.2"]
    assert all(0 < axis.place(value) < 1 for value in (3.54, 4.26))


def test_log_axis_places_by_ratio() -> None:
    """Equal ratios are equal distances; ticks are powers of ten, large ones written short."""
    axis = number_axis("rate", [1e-5, 1e-1], log=True)
    assert axis.place(1e-3) == pytest.approx(0.5)
    assert [words for _, words in axis.ticks] == ["1e-05", "0.0001", "0.001", "0.01", "0.1"]
    sizes = number_axis("size", [2e4, 5e6], log=True)
    assert [words for _, words in sizes.ticks] == ["100k", "1M"]


@pytest.mark.parametrize("log", [False, True])
def test_one_value_lies_in_the_middle(log: bool) -> None:
    """An axis of a single value is no division by zero."""
    assert number_axis("x", [8.0, 8.0], log).place(8.0) == pytest.approx(0.5)
    assert number_axis("x", [0.0]).place(0.0) == pytest.approx(0.5)


def test_axis_without_a_place_is_refused() -> None:
    """No value, and nothing at or below zero on a log axis."""
    for values in ([], [0.0, 1.0]):
        with pytest.raises(ValueError, match="no axis"):
            number_axis("x", values, log=True)


def test_words_are_marked_in_order() -> None:
    """A choice's values stand at 0, 1, …; a few numbers are marked one by one."""
    assert word_axis("m", ["a", "b"]).ticks == ((0.0, "a"), (1.0, "b"))
    assert [words for _, words in step_axis("r", [8, 2, 8], log=True).ticks] == ["2", "8"]


def test_dots_are_drawn_at_their_values() -> None:
    """A larger y is higher up, a larger x further right; tooltips and titles are escaped."""
    axes = (ChartAxis("x", 0, 1, ()), ChartAxis("y", 0, 1, ()))
    dots = [ChartDot(0.2, 0.1, "<a>"), ChartDot(0.8, 0.9, "b & c")]
    drawn = ElementTree.fromstring(plot("T<", "d", axes, dots))
    low, high = drawn.findall(f"{SVG}circle")
    assert float(high.attrib["cx"]) > float(low.attrib["cx"])
    assert float(high.attrib["cy"]) < float(low.attrib["cy"])
    assert [dot.findtext(f"{SVG}title") for dot in (low, high)] == ["<a>", "b & c"]
    assert drawn.findtext(f"{SVG}title") == "T<"


def test_series_differ_in_shape_and_colour() -> None:
    """Four series in a row have four shapes, so that colour is never alone."""
    axes = (ChartAxis("x", 0, 1, ()), ChartAxis("y", 0, 1, ()))
    dots = [ChartDot(0.5, 0.5, str(n), n) for n in range(4)]
    drawn = ElementTree.fromstring(plot("T", "d", axes, dots))
    shapes = [
        (mark.tag, (mark.get("d") or "").split("l")[-1])
        for mark in drawn
        if (mark.get("class") or "").startswith("f ")
    ]
    assert len(set(shapes)) == 4


def test_cut_line_ends_in_a_cross() -> None:
    """A pruned trial's curve has a mark of its own at its end."""
    axes = (ChartAxis("x", 0, 4, ()), ChartAxis("y", 0, 1, ()))
    points = ((0.0, 1.0), (2.0, 0.5))
    whole = plot("T", "d", axes, lines=[ChartLine(points, "w")])
    cut = plot("T", "d", axes, lines=[ChartLine(points, "w", cut=True)])
    assert cut.count("<path") == whole.count("<path") + 1


def test_bars_are_as_long_as_their_values() -> None:
    """Twice the share is twice the length."""
    drawn = ElementTree.fromstring(bars("T", "d", [("a", 0.6, "60 %"), ("b", 0.3, "30 %")]))
    long, short = (float(bar.attrib["width"]) for bar in drawn.findall(f"{SVG}rect"))
    assert long == pytest.approx(2 * short, abs=0.2)


def test_parallel_lines_meet_every_axis() -> None:
    """A line has one point on each axis."""
    axes = [number_axis(name, [0.0, 1.0]) for name in "abc"]
    drawn = ElementTree.fromstring(
        parallel("T", "d", axes, [ChartLine(((0, 0.0), (1, 1.0), (2, 0.5)), "w")])
    )
    line = drawn.find(f"{SVG}polyline")
    assert line is not None
    places = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert [x for x, _ in places] == sorted({x for x, _ in places})
    assert places[1][1] < places[2][1] < places[0][1]
    assert all(math.isfinite(y) for _, y in places)


def test_pareto_front() -> None:
    """The points that no other beats in both, from left to right; of ROUGE the higher is better."""
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.5), (2.0, 2.0), (4.0, 1.0), (1.0, 3.0)]
    assert pareto(points, LOSS) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert pareto(points, ROUGE) == [(1.0, 3.0), (2.0, 3.5)]


def _targets(objective: Objective) -> StudyResults:
    """Attention gives 0.2 and 0.5 with ever more parameters, mlp gives 0.3 and 0.4."""
    found = (("attention", 0.2), ("mlp", 0.3), ("mlp", 0.4), ("attention", 0.5))
    trials = [
        make_trial("lora", number, "finished", value, {TRAINABLE: 10.0 * (number + 1)}).model_copy(
            update={"params": {TARGETS: name}}
        )
        for number, (name, value) in enumerate(found)
    ]
    facts = FACTS if objective == LOSS else ROUGE_FACTS
    return make_results(make_arm("lora", trials, objective=objective, facts=facts))


@pytest.mark.parametrize("objective", [LOSS, ROUGE])
def test_target_modules_are_not_ranked(objective: Objective) -> None:
    """Each choice was tried at other rates and ranks, so the figure names no best one."""
    figure = target_figure(_targets(objective))
    assert figure.svg is not None
    assert "best first" not in figure.svg
    assert "do not show which one is better" in figure.caption
    assert not re.search(r"\d\.\d", figure.caption)


def test_titles_name_the_objective() -> None:
    """Figures of the objective of a study that maximises ROUGE are not called figures of losses."""
    for objective, word in ((LOSS, "loss"), (ROUGE, "eval rougeL")):
        results = _targets(objective)
        titles = [rate_figure(results).title, pareto_figure(results).title]
        assert all(word.lower() in title.lower() for title in titles), titles
        assert objective == LOSS or not any("loss" in title.lower() for title in titles)


def test_the_front_of_a_maximised_objective_joins_the_best() -> None:
    """Every larger trial has a higher ROUGE, so all four are joined; of losses the smallest alone."""
    joined = [len(_front(_targets(objective))) for objective in (ROUGE, LOSS)]
    assert joined == [4, 1]


def _front(results: StudyResults) -> list[str]:
    """The places that the front of the figure goes through."""
    svg = pareto_figure(results).svg
    assert svg is not None
    drawn = ElementTree.fromstring(svg)
    (line,) = drawn.findall(f".//{SVG}polyline")
    return line.attrib["points"].split()
