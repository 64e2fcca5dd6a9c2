"""Two searches compared by CPU time: what a curve holds, and what the signs of pairs show."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.real_searches import (
    SEARCHES,
    best_within,
    compare,
    mean_curve,
    picture,
    sign_test,
    stairs,
)

OLD, NEW = SEARCHES
FALLING = [(50.0, math.inf), (70.0, 3.7), (130.0, 3.6), (190.0, 3.6)]


def test_a_curve_is_read_at_what_has_ended() -> None:
    """A trial counts from the second at which it ended, and a pruned one has no loss."""
    assert best_within(FALLING, 69.9) == math.inf
    assert best_within(FALLING, 70.0) == 3.7
    assert best_within(FALLING, 1000.0) == 3.6


@pytest.mark.parametrize(
    ("now", "better", "p_value"),
    [([1.0] * 5, 5, 0.0625), ([1.0] * 4 + [3.0], 4, 0.375), ([2.0] * 5, 0, 1.0)],
)
def test_the_sign_test_is_exact(now: list[float], better: int, p_value: float) -> None:
    """Five of five are 2 of 32 ways, four of five 12 of 32, and equal pairs decide nothing."""
    found = sign_test([2.0] * 5, now)
    assert found["better"] == better
    assert found["p, two-sided"] == pytest.approx(p_value, abs=1e-4)


def test_searches_are_compared_at_minutes_that_all_have() -> None:
    """The shortest curve ends the table, and without a loss in each search there is no mean."""
    short = [(40.0, 3.5), (125.0, 3.4)]
    found = compare({OLD: [FALLING, FALLING], NEW: [short, short]})
    assert list(found["after CPU minutes"]) == [1, 2]
    assert found["after CPU minutes"][1]["mean"] == {OLD: None, NEW: 3.5}
    assert found["after CPU minutes"][2]["signs"]["better"] == 2
    assert found["after all trials"]["mean"] == {OLD: 3.6, NEW: 3.4}


def test_the_picture_is_svg_with_a_line_for_each_search() -> None:
    """A curve holds its value until a better one is found, so it has two corners for each trial."""
    assert stairs([(1.0, 3.7), (2.0, 3.6)]) == ((1.0, 3.7), (2.0, 3.7), (2.0, 3.6))
    assert mean_curve([[(60.0, 3.8), (120.0, 3.6)], [(90.0, 3.6), (150.0, 3.5)]]) == [
        (1.5, pytest.approx(3.7)),
        (2.0, pytest.approx(3.6)),
    ]
    drawn = picture("chat", {OLD: [FALLING] * 5, NEW: [FALLING] * 5})
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert f"{NEW}, seed 400" in drawn
    assert f"{NEW}, mean" in drawn
