"""Simulate the further trials of a search on functions that its own trials allow.

The functions are drawn from the surface of sampler=lora. On each, the sampler's rule (the point of
greatest expected improvement) chooses among random candidates, and learns the drawn values with noise.
The shape of the surface stays, so a step costs a thousandth of a sampler's draw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from sweeper.search.adapter_geometry import AdapterGeometry, Columns
from sweeper.search.candidate_points import CandidatePoints
from sweeper.search.geometry_sampler import SPREADS, as_rows, best_of, surface_of, tried_rows
from sweeper.search.observed_trials import CostScale, ObservedTrials, count_of
from sweeper.search.surface_model import FittedSurface, expected_improvement

FUNCTIONS = 64
"""Number of functions that are drawn."""
ANYWHERE = 400
"""Number of candidates all over the space."""
COPIES = 20
"""Number of candidates near each of the best points, for each of SPREADS."""
TRIED = 100
"""Most points of the record on which a function may be lowest: the others have cost too much."""
JITTER = 1e-8
"""Share of the surface's variance by which rounding may make a covariance matrix indefinite."""


def simulated_gains(
    geometry: AdapterGeometry, seen: ObservedTrials, trials: int
) -> tuple[NDArray[np.float64], int]:
    """Return by how much further trials lower the cost on each drawn function, and their number.

    The costs of a function are compared without noise: the lowest one of all points that then are
    tried with the lowest one of those that are.

    Args:
        geometry: of the space.
        seen: what is known, with a cost at least.
        trials: number of further trials. Fewer are simulated if the space has no more points.

    Returns:
        The gains in the cost's unit, and the number of trials that were simulated.
    """
    generator = np.random.default_rng(0)
    # one thread: the sums of several depend on their number, and answers must not
    with threadpool_limits(limits=1):
        surface = surface_of(geometry, seen)
        candidates = _untried(geometry, seen, generator)
        count = count_of(candidates)
        trials = min(trials, count)
        points = {
            key: np.concatenate([candidates[key], column])
            for key, column in best_of(seen, TRIED).items()
        }
        mean, covariance = surface.joint(points)
        functions = _draw(mean, covariance, JITTER * surface.variance, generator)
        reached = _search(
            mean[:count],
            covariance[:count, :count],
            functions[:, :count],
            surface,
            trials,
            generator,
        )
    tried = functions[:, count:].min(axis=1)
    scale = CostScale.of(seen.costs)
    return scale.costs(tried) - scale.costs(np.minimum(tried, reached)), trials


def _untried(
    geometry: AdapterGeometry, seen: ObservedTrials, generator: np.random.Generator
) -> Columns:
    """Return candidates, each of them once, without the points of the record."""
    points = CandidatePoints(geometry, generator, {})
    best = points.rows(best_of(seen))
    rows = [points.anywhere(ANYWHERE), *(points.near(best, COPIES, each) for each in SPREADS)]
    columns = points.columns(np.concatenate(rows))
    known = tried_rows(seen)
    # a dict keeps the order of the candidates, a set has another one in each process
    first = {row: place for place, row in reversed(list(enumerate(as_rows(columns))))}
    kept = sorted(place for row, place in first.items() if row not in known)
    return {key: column[kept] for key, column in columns.items()}


def _draw(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    jitter: float,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Return values of drawn functions at points, as (functions, points)."""
    # eigenvalues rather than Cholesky's factor, which a matrix without full rank has not
    squares, directions = np.linalg.eigh(covariance + jitter * np.eye(len(mean)))
    root = directions * np.sqrt(np.maximum(squares, 0.0))
    return np.asarray(mean + generator.standard_normal((FUNCTIONS, len(mean))) @ root.T)


def _search(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    functions: NDArray[np.float64],
    surface: FittedSurface,
    trials: int,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Return the lowest value that simulated trials find on each function.

    Args:
        mean: of the surface at the candidates.
        covariance: of the surface at the candidates.
        functions: values of the functions at the candidates.
        surface: gives the noise, and the value to improve on.
        trials: number of trials.
        generator: of the noise.
    """
    each = np.arange(len(functions))
    means = np.tile(mean, (len(functions), 1))
    variances = np.tile(np.diag(covariance), (len(functions), 1))
    learnt = np.zeros((len(functions), trials, len(mean)))
    """Of each trial, the covariances of its value with those at the candidates, in its deviations."""
    best, lowest = np.full(len(functions), surface.best), np.full(len(functions), np.inf)
    closed = np.zeros(means.shape, dtype=bool)
    for trial in range(trials):
        deviations = np.sqrt(np.maximum(variances, 1e-12))
        promise = expected_improvement(means, deviations, best[:, None])
        chosen = np.argmax(np.where(closed, -1.0, promise), axis=1)
        closed[each, chosen] = True
        values = functions[each, chosen]
        measured = values + generator.normal(0, np.sqrt(surface.noise), len(functions))
        # one more value changes a normal distribution by a matrix of rank one, so none is inverted
        before = learnt[:, :trial]
        shared = np.einsum("ft,ftp->fp", before[each, :, chosen], before)
        spread = np.sqrt(np.maximum(variances[each, chosen], 0.0) + surface.noise)[:, None]
        learnt[:, trial] = (covariance[chosen] - shared) / spread
        surprise = (measured - means[each, chosen])[:, None] / spread
        means = means + learnt[:, trial] * surprise
        variances = variances - learnt[:, trial] ** 2
        best, lowest = np.minimum(best, measured), np.minimum(lowest, values)
    return lowest
