"""A smooth surface through a bank: the worth of points without the luck of the seed that chose them.

A policy chooses by the values of seed 0, so those values flatter the points that it chose. The best
points of a bank therefore have trainings of further seeds, and the surface goes through their means. At
any other point it goes through the value of seed 0, as near as the fitted noise says.

*Rejected:* for points without further seeds, the surface through all others. On a bank of 96 points it
is wrong by 0.04 nats in the better half, seven times the spread of a seed.

Values are warped by their logarithm above the best, because far from the best a surface of losses is
steep and its details do not matter. The Gaussian process is scikit-learn's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from benchmarks.curves.bank_points import MODULES, RANK, RATE, RATIO, TARGETS, WARMUP, Point

BELOW = 0.05
"""Nats below the best value at which the warp has its zero: about eight times the spread of a seed."""


@dataclass(frozen=True)
class BankSurface:
    """The values of points as the surface has them, in nats per token."""

    values: NDArray[np.float64]
    """Value of each point that the surface was fitted to."""
    error_of_best_half: float
    """Root mean square of the leave-one-out errors of the better half of the points."""
    _process: GaussianProcessRegressor
    _floor: float

    def at_points(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """Return the surface's values at any points."""
        warped: NDArray[np.float64] = self._process.predict(features(points))
        return np.exp(warped) + self._floor


def features(points: Sequence[Point]) -> NDArray[np.float64]:
    """Return coordinates of points, each of about unit range."""
    return np.array(
        [
            [
                math.log10(float(point[RATE])) / 2,
                math.log2(float(point[RANK])) / 4,
                math.log2(float(point[RATIO])) / 3,
                *(float(point[TARGETS] == name) for name in MODULES),
                10 * float(point[WARMUP]),
            ]
            for point in points
        ]
    )


def fit_surface(
    points: Sequence[Point], values: Sequence[float], fresh: Sequence[float | None]
) -> BankSurface:
    """Fit the surface of a bank.

    Args:
        points: the points.
        values: their finite values of the seed that policies see.
        fresh: the mean over other seeds of each point, or None where there are none.
    """
    seen = np.array(values)
    pairs = zip(values, fresh, strict=True)
    targets = np.array([value if mean is None else mean for value, mean in pairs])
    floor = float(targets.min()) - BELOW
    warped = np.log(targets - floor)
    coordinates = features(points)
    scales = np.ones(coordinates.shape[1])
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(scales, (5e-2, 5e1), nu=2.5)
    process = GaussianProcessRegressor(
        kernel + WhiteKernel(1e-2, (1e-5, 1.0)), normalize_y=True, random_state=0
    )
    with warnings.catch_warnings():
        # a coordinate that does not matter has a scale at its bound
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(coordinates, warped)
    inside, outside = _posteriors(process, coordinates, warped)
    worth = np.exp(inside) + floor
    errors = (np.exp(outside) + floor - seen)[np.argsort(seen)[: max(1, len(seen) // 2)]]
    return BankSurface(worth, float(np.sqrt(np.mean(errors**2))), process, floor)


def _posteriors(
    process: GaussianProcessRegressor, coordinates: NDArray[np.float64], warped: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the process's means at its own points: with each point's value, and without it."""
    covariance = process.kernel_(coordinates)  # with the noise on its diagonal
    centre, spread = warped.mean(), warped.std()
    standard = (warped - centre) / spread
    inverse = np.linalg.inv(covariance)
    weights = inverse @ standard
    without = standard - weights / np.diag(inverse)
    return process.predict(coordinates), without * spread + centre
