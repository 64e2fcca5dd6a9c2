"""Random points of a space, all over it and near given ones, many at a time.

A point is a row of numbers from 0 to 1, one for each key, in which every value of a domain has the share
that a uniform draw gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sweeper.config.space import Choice, Domain, Interval, Scalar
from sweeper.search.adapter_geometry import AdapterGeometry, Column, Columns
from sweeper.search.ordered_choices import numbers_of

Rows = NDArray[np.float64]

JUMP = 0.2
"""Share of moved points that take another value of a choice without an order."""


class CandidatePoints:
    """Draws points of one space, some of whose keys may be fixed."""

    def __init__(
        self,
        geometry: AdapterGeometry,
        generator: np.random.Generator,
        fixed: Mapping[str, Scalar],
    ) -> None:
        """
        Args:
            geometry: names the keys and their domains.
            generator: of random numbers.
            fixed: values that every point has.
        """
        self._space = geometry.space
        self._generator = generator
        point = {key: fixed[key] for key in self._space if key in fixed}
        own = {key: domain for key, domain in self._space.items() if key in point}
        self._fixed = AdapterGeometry(own, None).columns([point])
        self._jumps = np.array([_has_no_order(domain) for domain in self._space.values()])

    def anywhere(self, count: int) -> Rows:
        """Return points all over the space."""
        return self._generator.random((count, len(self._space)))

    def near(self, rows: Rows, copies: int, spread: float) -> Rows:
        """Return several points near each given one.

        Args:
            rows: the given points.
            copies: number of points near each.
            spread: standard deviation of a step along a key, as a share of its range.
        """
        start = np.repeat(rows, copies, axis=0)
        moved = np.clip(start + self._generator.normal(0, spread, start.shape), 0, 1)
        other = self._generator.random(start.shape)
        jumped = np.where(self._generator.random(start.shape) < JUMP, other, start)
        return np.where(self._jumps, jumped, moved)

    def rows(self, columns: Columns) -> Rows:
        """Return known points as rows."""
        shares = [shares_of(domain, columns[key]) for key, domain in self._space.items()]
        return np.column_stack(shares)

    def columns(self, rows: Rows) -> Columns:
        """Return the values of points."""
        found = {
            key: values_at(domain, rows[:, place])
            for place, (key, domain) in enumerate(self._space.items())
        }
        full = {key: np.full(len(rows), column[0]) for key, column in self._fixed.items()}
        return {**found, **full}


def values_at(domain: Domain, shares: Column) -> Column:
    """Return the values of a domain at shares from 0 to 1 of a uniform draw."""
    if isinstance(domain, Choice):
        return _cells(len(domain.values), shares)
    if domain.step is not None:
        return np.asarray(domain.low + domain.step * _cells(domain.count, shares))
    if domain.log:
        low, high = math.log(domain.low), math.log(domain.high)
        found = np.exp(low + (high - low) * shares)
        found = np.rint(found) if domain.integer else found
    elif domain.integer:
        found = domain.low + _cells(int(domain.high - domain.low) + 1, shares)
    else:
        found = domain.low + (domain.high - domain.low) * shares
    return np.clip(found, domain.low, domain.high)


def shares_of(domain: Domain, values: Column) -> Column:
    """Return shares at which `values_at` gives values of a domain."""
    if isinstance(domain, Choice):
        found = (values + 0.5) / len(domain.values)
    elif domain.step is not None:
        found = ((values - domain.low) / domain.step + 0.5) / domain.count
    elif domain.log:
        low, high = math.log(domain.low), math.log(domain.high)
        found = (np.log(values) - low) / (high - low)
    elif domain.integer:
        found = (values - domain.low + 0.5) / (domain.high - domain.low + 1)
    else:
        found = (values - domain.low) / (domain.high - domain.low)
    return np.clip(found, 0, 1)


def _cells(count: int, shares: Column) -> Column:
    """Return which of `count` equal cells each share lies in."""
    return np.minimum(np.floor(shares * count), count - 1)


def _has_no_order(domain: Domain) -> bool:
    return not isinstance(domain, Interval) and numbers_of(domain.values) is None
