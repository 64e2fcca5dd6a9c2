"""A Gaussian process over the coordinates of a space, by scikit-learn.

With few points, length scales that maximise the likelihood freely fit the noise. They are therefore
chosen from a short list that served on a bank of trainings, together with gamma and the noise. Knows
no trial, no sampler and no unit: values are centred and of unit spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from sweeper.search.adapter_geometry import AdapterGeometry, Column, Columns

GAMMAS = (0.5, 0.25, 0.75, 0.0, 1.0)
GAMMA_SPREAD = 0.25
"""Standard deviation of the normal prior of gamma around the first of GAMMAS."""
RATES = (0.3, 0.15, 0.6)
OTHERS = (1.5, 0.6, 4.0)
NOISES = (0.03, 0.003, 0.1)
"""Variance of the noise as a share of the surface's own. Of each list, the first is tried first."""
ROUNDS = 2
"""Rounds in which each part of a shape is chosen with the others as they are."""
CHOOSING = 100
"""Most points by which a shape is chosen: the cost grows with their third power."""
LEAST_VARIANCE = 1e-3
"""Least variance of a surface, so that a few equal values do not make it certain everywhere."""


@dataclass(frozen=True)
class SurfaceShape:
    """The chosen properties of a surface: how fast it changes, and its share of noise."""

    gamma: float = GAMMAS[0]
    rate: float = RATES[0]
    other: float = OTHERS[0]
    noise: float = NOISES[0]

    @property
    def log_prior(self) -> float:
        """The logarithm of the prior density of gamma, up to a constant."""
        return -0.5 * ((self.gamma - GAMMAS[0]) / GAMMA_SPREAD) ** 2


class FittedSurface:
    """A surface of one shape through values at points."""

    def __init__(
        self,
        geometry: AdapterGeometry,
        shape: SurfaceShape,
        columns: Columns,
        values: Column,
        variance: float | None = None,
    ) -> None:
        """
        Args:
            geometry: the coordinates.
            shape: see SurfaceShape.
            columns: the points.
            values: one for each point, centred.
            variance: the surface's variance, or None to estimate it from the values.
        """
        self._geometry, self.shape = geometry, shape
        self._columns, self._values = columns, values
        coordinates = geometry.coordinates(columns, shape.gamma)
        lengths = np.full(coordinates.shape[1], shape.other)
        if geometry.has_rate:
            lengths[0] = shape.rate
        kernel = Matern(length_scale=lengths, length_scale_bounds="fixed", nu=2.5)
        self._process = GaussianProcessRegressor(kernel, alpha=shape.noise, optimizer=None)
        self._process.fit(coordinates, values)
        explained = float(values @ self._process.alpha_) / len(values)
        # the variance of greatest likelihood for this kernel
        self.variance = explained + LEAST_VARIANCE if variance is None else variance

    @property
    def log_likelihood(self) -> float:
        """The logarithm of the likelihood at the estimated variance, with the prior of the shape."""
        spread = float(np.log(np.diag(self._process.L_)).sum())
        half = len(self._values) / 2
        return -half * float(np.log(self.variance)) - spread + self.shape.log_prior

    def predict(self, columns: Columns) -> tuple[Column, Column]:
        """Return the mean and the standard deviation of the surface at points, without the noise."""
        coordinates = self._geometry.coordinates(columns, self.shape.gamma)
        mean, deviation = self._process.predict(coordinates, return_std=True)
        return mean, np.maximum(deviation, 1e-6) * np.sqrt(self.variance)

    def joint(self, columns: Columns) -> tuple[Column, NDArray[np.float64]]:
        """Return the means and the covariance matrix of the surface at points, without the noise."""
        coordinates = self._geometry.coordinates(columns, self.shape.gamma)
        mean, covariance = self._process.predict(coordinates, return_cov=True)
        return mean, covariance * self.variance

    @property
    def noise(self) -> float:
        """The variance of the noise of a value."""
        return self.shape.noise * self.variance

    @property
    def best(self) -> float:
        """The lowest value."""
        return float(self._values.min())

    def expected_improvement(self, columns: Columns, best: float) -> Column:
        """Return by how much each point is expected to be below `best`, counting no loss."""
        mean, deviation = self.predict(columns)
        return expected_improvement(mean, deviation, best)

    def believing(self, pending: Columns) -> FittedSurface:
        """Return the surface that also passes through its own means at points without a value."""
        mean, _ = self.predict(pending)
        # a gain that was not measured yet would draw the next point near
        return self.with_values(pending, np.maximum(mean, self.best))

    def with_values(self, columns: Columns, values: Column) -> FittedSurface:
        """Return the surface of the same shape through further values."""
        all_columns = {
            key: np.concatenate([self._columns[key], columns[key]]) for key in self._columns
        }
        all_values = np.concatenate([self._values, values])
        return FittedSurface(self._geometry, self.shape, all_columns, all_values, self.variance)


def expected_improvement(mean: Column, deviation: Column, best: Column | float) -> Column:
    """Return by how much normal values are expected to be below `best`, counting no loss."""
    gain = best - mean
    ratio = gain / deviation
    return np.asarray(gain * norm.cdf(ratio) + deviation * norm.pdf(ratio))


def choose_shape(geometry: AdapterGeometry, columns: Columns, values: Column) -> SurfaceShape:
    """Return the shape whose likelihood is greatest when its parts are chosen in turn."""
    kept = _spread_over(values)
    columns, values = {key: column[kept] for key, column in columns.items()}, values[kept]
    known: dict[SurfaceShape, float] = {}

    def likelihood(shape: SurfaceShape) -> float:
        if shape not in known:
            known[shape] = FittedSurface(geometry, shape, columns, values).log_likelihood
        return known[shape]

    best = SurfaceShape()
    for _ in range(ROUNDS):
        for part, candidates in _parts(geometry).items():
            shapes = [replace(best, **{part: value}) for value in candidates]
            best = max(shapes, key=likelihood)
    return best


def _parts(geometry: AdapterGeometry) -> dict[str, Sequence[float]]:
    """Return the values to choose from for each part of a shape that changes anything."""
    found: dict[str, Sequence[float]] = {"other": OTHERS, "noise": NOISES}
    if geometry.has_rate:
        found = {"rate": RATES, **found}
    return {**found, "gamma": GAMMAS} if geometry.mixes else found


def _spread_over(values: Column) -> NDArray[np.int64]:
    """Return the indices of at most CHOOSING values, evenly spread from the lowest to the highest."""
    order = np.argsort(values, kind="stable")
    if len(order) <= CHOOSING:
        return np.sort(order)
    places = np.linspace(0, len(order) - 1, CHOOSING).round().astype(int)
    return np.sort(order[places])
