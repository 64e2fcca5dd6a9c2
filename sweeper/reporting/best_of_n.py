"""Compute the expected best of n trials of an arm: the find of a search of fewer trials.

Arms differ in their number of trials, and the best of many is better than the best of a few by luck
alone. The expectation is over all choices of n trials among those that the arm has, without
replacement (Dodge et al. 2019, arXiv:1909.03004, with the exact hypergeometric weights). A pruned trial
counts with the value at which it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sweeper.config.settings import Objective
from sweeper.reporting.results import ArmResult


def trial_values(arm: ArmResult) -> list[float]:
    """Return the values of an arm's trials that have one, those of pruned ones included."""
    return [trial.value for trial in arm.trials if trial.value is not None]


def expected_best(values: Sequence[float], count: int, objective: Objective) -> float:
    """Return the expected best of `count` of the values.

    Raises:
        ValueError: there are fewer values than that, or none is asked for.
    """
    total = len(values)
    if not 1 <= count <= total:
        raise ValueError(f"the best of {count} of {total} values is not defined")
    ordered = sorted(values, key=objective.order)
    # The value at a place is the best if the other count - 1 are drawn from those behind it.
    ways = [math.comb(total - place, count - 1) for place in range(1, total + 1)]
    return sum(value * way for value, way in zip(ordered, ways, strict=True)) / sum(ways)


def best_of_n(arm: ArmResult, most: int | None = None) -> tuple[tuple[float, float], ...]:
    """Return pairs of a number of trials and the expected best of so many, from one trial on."""
    values = trial_values(arm)
    counts = range(1, min(len(values), most or len(values)) + 1)
    return tuple((float(count), expected_best(values, count, arm.objective)) for count in counts)
