"""Sort an arm's trials into points with a cost, impossible points, and points without an answer.

A cost is lower where a trial is better, in the unit of the objective. A trial that was stopped has a
cost as well: its last look, less what others gained from there to their end. Without that, a sampler
proposes such points again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.space import Draw
from sweeper.search.adapter_geometry import AdapterGeometry, Columns
from sweeper.search.record_prefix import turn_of
from sweeper.search.telling import is_measured

FIRST = 32
"""Number of first costs from which the unit of the log scale is taken."""
QUARTER = 0.25
REACH = 20.0
"""Units above the best from which on a cost counts as equally bad."""


@dataclass(frozen=True)
class ObservedTrials:
    """The trials of an arm, sorted by what is known of their points."""

    valued: Columns
    """Points with a cost, in the order in which they were asked."""
    costs: NDArray[np.float64]
    infeasible: Columns
    """Points that cannot be trained."""
    pending: Columns
    """Points that are being trained, or whose training failed for a reason of its own."""

    @property
    def known(self) -> int:
        """Number of points about which something is known."""
        return len(self.costs) + count_of(self.infeasible)


def count_of(columns: Columns) -> int:
    """Return the number of points of columns."""
    return len(next(iter(columns.values()), ()))


def observe(
    trials: Sequence[FrozenTrial],
    geometry: AdapterGeometry,
    sign: float,
    looks_are_values: bool,
) -> ObservedTrials:
    """Return what trials say about the points of a space.

    Args:
        trials: those that a decision reads, as Optuna has them.
        geometry: of the space. Trials elsewhere, or without all of its keys, are left out.
        sign: 1 if the study's values are minimised, -1 if they are maximised.
        looks_are_values: True if looks measure the objective, False if they measure another metric.
    """
    inside = [trial for trial in trials if geometry.covers(trial.params) and not _is_copy(trial)]
    inside.sort(key=lambda trial: turn_of(trial).place)
    ends = MeasuredEnds(inside, sign, looks_are_values)
    costs: list[float] = []
    valued: list[Draw] = []
    infeasible: list[Draw] = []
    pending: list[Draw] = []
    for trial in inside:
        cost = ends.cost_of(trial)
        if cost is not None:
            valued.append(trial.params)
            costs.append(cost)
        elif trial.state is TrialState.COMPLETE:
            infeasible.append(trial.params)
        else:
            pending.append(trial.params)
    return ObservedTrials(
        geometry.columns(valued),
        np.array(costs),
        geometry.columns(infeasible),
        geometry.columns(pending),
    )


class MeasuredEnds:
    """Looks and final costs of the trials that have a value of their own."""

    def __init__(self, trials: Sequence[FrozenTrial], sign: float, looks_are_values: bool) -> None:
        """
        Args:
            trials: of any state.
            sign: 1 if values are minimised, -1 if they are maximised.
            looks_are_values: True if looks measure the objective.
        """
        self._sign = sign
        self._looks_are_values = looks_are_values
        self._finals: list[float] = []
        self._pairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
        """The look and the final cost of each trial, by the place of the look in per-mille."""
        for trial in trials:
            if is_measured(trial):
                self._add(trial)

    def cost_of(self, trial: FrozenTrial) -> float | None:
        """Return what a trial cost, or would have cost at its end, or None if nothing says so."""
        if is_measured(trial):
            return self._sign * _value(trial)
        stopped = trial.state is TrialState.PRUNED and trial.intermediate_values
        if not stopped or not self._finals:
            return None
        place = max(trial.intermediate_values)
        expected = self._expected(self._sign * trial.intermediate_values[place], place)
        # a trial is stopped because it is worse than others, so it is never the best
        return max(expected, min(self._finals))

    def _add(self, trial: FrozenTrial) -> None:
        final = self._sign * _value(trial)
        self._finals.append(final)
        for place, look in trial.intermediate_values.items():
            self._pairs[place].append((self._sign * look, final))

    def _expected(self, look: float, place: int) -> float:
        """Return the final cost that is expected after a look at a place of the schedule."""
        pairs = self._pairs.get(place, [])
        if not pairs:
            return max(self._finals)
        if self._looks_are_values:
            return look - float(np.median([other - final for other, final in pairs]))
        # another metric has another unit: the trial whose look is nearest stands for this one
        return min(pairs, key=lambda pair: abs(pair[0] - look))[1]


@dataclass(frozen=True)
class CostScale:
    """A log scale above the best cost, centred and of unit spread.

    Differences near the best then count as much as those between bad points, and a diverged point no
    more than a bad one. Costs that are shifted, or multiplied by a positive number, give the same.
    """

    best: float
    unit: float
    """See `log_unit`."""
    mean: float
    spread: float

    @classmethod
    def of(cls, costs: NDArray[np.float64]) -> CostScale:
        """Return the scale of costs in the order in which the points were asked."""
        best, unit = float(costs.min()), log_unit(costs)
        logs = _logs(costs, best, unit)
        return cls(best, unit, float(logs.mean()), float(logs.std()) + 1e-6)

    def values(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return costs on the scale."""
        return (_logs(costs, self.best, self.unit) - self.mean) / self.spread

    def costs(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the costs that have these values. None is a unit or more below the best."""
        return self.best + np.exp(values * self.spread + self.mean) - self.unit


def _logs(costs: NDArray[np.float64], best: float, unit: float) -> NDArray[np.float64]:
    return np.asarray(np.log(np.minimum(costs - best, REACH * unit) + unit))


def log_above_best(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return costs, in the order in which the points were asked, on their scale."""
    return CostScale.of(costs).values(costs)


def log_unit(costs: NDArray[np.float64]) -> float:
    """Return the distance above the best up to which a cost counts on a linear scale.

    It is the largest distance of a lower quartile from the best so far, among the first costs. Later
    ones are near the best because the search went there, and would shrink the unit below the noise.
    """
    first = costs[:FIRST]
    found = max(
        float(np.quantile(first[:count], QUARTER) - first[:count].min())
        for count in range(1, len(first) + 1)
    )
    # equal costs have no scale: any unit above rounding gives equal logs
    return max(found, 1e-9 * (1 + float(np.abs(costs).max())))


def _is_copy(trial: FrozenTrial) -> bool:
    """Return True for a trial that was answered with another one's result."""
    # a trial that is shown as running already has the cause of its later end
    return trial.state.is_finished() and trial.user_attrs.get("cause") == "duplicate"


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
