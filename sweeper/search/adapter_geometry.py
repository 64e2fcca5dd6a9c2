"""Coordinates in which a change of LoRA's settings changes the training by as much everywhere.

A learning rate and an alpha act on the same update, so the best rate falls where alpha rises. One
coordinate is therefore log(rate) + gamma * log(alpha), and gamma is learnt from the trials. Ranks
and alphas count in doublings. Other numbers count as a share of their range, and choices without an
order are equally far from each other. Knows neither Optuna nor a Gaussian process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sweeper.config.settings import LoraAdapter
from sweeper.config.space import Choice, Domain, Draw, Interval, Scalar
from sweeper.search.ordered_choices import numbers_of

Column = NDArray[np.float64]
Columns = dict[str, Column]
"""The values of several points by key: the number itself, or the index of a choice's value."""

RATE = "training.learning_rate"
WARMUP = "training.warmup_ratio"
RANK, ALPHA, RATIO = "adapter.r", "adapter.lora_alpha", "adapter.alpha_over_r"

# One unit of each coordinate changes the loss by about as much: the proportions of a bank of 312
# trainings of the embedded base (docs/search.md, Samplers)
DECADES = 2.0
"""Decades of the learning rate in one unit."""
DOUBLINGS = 4.0
"""Doublings of the rank in one unit. Alpha and warm-up change less, by the factor QUIET."""
QUIET = 3.0
WARMUP_SHARE = 0.1
"""Share of the schedule in one unit of a ratio of warm-up, before QUIET."""
WIDE = 8.0
"""Least factor between the ends of a choice of positive numbers that counts on a log scale."""


class AdapterGeometry:
    """The coordinates of the points of one space without branches."""

    def __init__(self, space: Mapping[str, Domain], adapter: LoraAdapter | None) -> None:
        """
        Args:
            space: a domain for each searched key.
            adapter: the adapter before any point is applied, or None where every weight is trained.
        """
        # by name, so that the order of a YAML file changes no draw
        self.space = dict(sorted(space.items()))
        self._adapter = adapter
        self._numeric = {
            key
            for key in (RATE, RANK, ALPHA, RATIO)
            if key in self.space and _is_positive(self.space[key])
        }

    @property
    def has_rate(self) -> bool:
        """True if the first coordinate is that of the learning rate."""
        return RATE in self._numeric

    @property
    def mixes(self) -> bool:
        """True if alpha varies while the rate is searched, so that gamma changes a distance."""
        if not self.has_rate or self._adapter is None:
            return False
        if {RATIO, ALPHA} & set(self.space):
            return bool({RATIO, ALPHA} & self._numeric)
        return RANK in self._numeric and self._adapter.alpha_over_r is not None

    def columns(self, points: Sequence[Mapping[str, Scalar]]) -> Columns:
        """Return the values of points, each of which has a value of every key."""
        return {
            key: np.array([_stored(domain, point[key]) for point in points], dtype=float)
            for key, domain in self.space.items()
        }

    def draw_at(self, columns: Columns, index: int) -> Draw:
        """Return the point at an index of columns, as values of the space."""
        return {
            key: _value(domain, float(columns[key][index])) for key, domain in self.space.items()
        }

    def covers(self, point: Mapping[str, Scalar]) -> bool:
        """Return True if a point has a value inside the domain of every key."""
        return all(key in point and self.allows(key, point[key]) for key in self.space)

    def allows(self, key: str, value: Scalar) -> bool:
        """Return True if a key of the space may have a value, up to rounding."""
        domain = self.space[key]
        if isinstance(domain, Choice):
            return _index(domain, value) is not None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # Optuna computes steps in binary, so its 0.3 is no step of 0.1
        slack = 1e-9 * (domain.high - domain.low)
        return domain.low - slack <= value <= domain.high + slack

    def coordinates(self, columns: Columns, gamma: float) -> NDArray[np.float64]:
        """Return one row of coordinates for each point. The rate's is the first, where it is searched.

        Args:
            columns: the points.
            gamma: power of alpha by which the best rate falls.
        """
        parts = [self._rates(columns, gamma)] if self.has_rate else []
        if RANK in self._numeric:
            parts.append(self._doublings(RANK, columns) / DOUBLINGS)
        if {RATIO, ALPHA} & self._numeric:
            parts.append(self._alpha_doublings(columns) / DOUBLINGS / QUIET)
        # in the order of the space: a set of names has another order in each process
        others = [key for key in self.space if key not in self._numeric]
        parts += [_plain(key, self.space[key], columns[key]) for key in others]
        return np.column_stack(parts)

    def _rates(self, columns: Columns, gamma: float) -> Column:
        found = np.log10(_numbers(self.space[RATE], columns[RATE]))
        if self.mixes:
            found = found + gamma * math.log10(2) * self._alpha_doublings(columns)
        return np.asarray(found / DECADES)

    def _doublings(self, key: str, columns: Columns) -> Column:
        return np.asarray(np.log2(_numbers(self.space[key], columns[key])))

    def _alpha_doublings(self, columns: Columns) -> Column:
        """Return log2 of the alpha that scales the update, up to a constant."""
        rank = self._doublings(RANK, columns) if RANK in self._numeric else np.zeros(1)
        if ALPHA in self._numeric:
            alpha = self._doublings(ALPHA, columns)
        else:
            ratio = self._doublings(RATIO, columns) if RATIO in self._numeric else np.zeros(1)
            # PEFT's alpha is the ratio times the rank
            alpha = ratio + rank
        if self._adapter is not None and self._adapter.use_rslora:
            # rsLoRA divides by the root of the rank only, as if alpha were larger by that root
            alpha = alpha + rank / 2
        return alpha


def _is_positive(domain: Domain) -> bool:
    """Return True if every value of a domain is a number above 0."""
    if isinstance(domain, Interval):
        return domain.low > 0
    numbers = numbers_of(domain.values)
    return numbers is not None and numbers[0] > 0


def _numbers(domain: Domain, column: Column) -> Column:
    """Return the numbers that a column stands for."""
    if isinstance(domain, Interval):
        return column
    return np.asarray(np.array(domain.values, dtype=float)[column.astype(int)])


def _plain(key: str, domain: Domain, column: Column) -> NDArray[np.float64]:
    """Return the coordinates of a key that LoRA's geometry does not name, as (points, dimensions)."""
    if isinstance(domain, Choice) and numbers_of(domain.values) is None:
        return np.asarray(np.eye(len(domain.values))[column.astype(int)])
    numbers = _numbers(domain, column)
    if key == WARMUP:
        return (numbers / WARMUP_SHARE / QUIET)[:, None]
    low, high, log = _range(domain)
    if low == high:
        return np.zeros((len(column), 1))
    if log:
        numbers, low, high = np.log(numbers), math.log(low), math.log(high)
    return ((numbers - low) / (high - low))[:, None]


def _range(domain: Domain) -> tuple[float, float, bool]:
    """Return the lowest and the highest number of a domain, and if it counts on a log scale."""
    if isinstance(domain, Interval):
        return domain.low, domain.high, domain.log
    numbers = numbers_of(domain.values)
    assert numbers is not None
    low, high = float(numbers[0]), float(numbers[-1])
    return low, high, low > 0 and high / low >= WIDE


def _stored(domain: Domain, value: Scalar) -> float:
    """Return a value as columns have it."""
    if isinstance(domain, Interval):
        snapped = domain.snap(value)
        assert isinstance(snapped, int | float)
        return float(snapped)
    index = _index(domain, value)
    assert index is not None
    return float(index)


def _index(domain: Choice, value: Scalar) -> int | None:
    """Return the index of a value among those of a choice, or None if it is none of them."""
    # True == 1 in Python
    same = (
        isinstance(each, bool) == isinstance(value, bool) and each == value
        for each in domain.values
    )
    return next((index for index, equal in enumerate(same) if equal), None)


def _value(domain: Domain, stored: float) -> Scalar:
    """Return the value of a domain that a column's number stands for."""
    if isinstance(domain, Choice):
        return domain.values[int(stored)]
    return domain.snap(stored)
