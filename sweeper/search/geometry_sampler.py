"""An Optuna sampler that knows how LoRA's settings act together.

It models the trials by a Gaussian process in the coordinates of `adapter_geometry`, and proposes the
point of greatest expected improvement. Every draw follows from a seed and the trials that are shown.
The sampler keeps nothing from draw to draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from threadpoolctl import threadpool_limits

from sweeper.config.space import Choice, Domain, Scalar
from sweeper.search.adapter_geometry import AdapterGeometry, Columns
from sweeper.search.candidate_points import CandidatePoints
from sweeper.search.observed_trials import (
    ObservedTrials,
    count_of,
    log_above_best,
    observe,
)
from sweeper.search.surface_model import FittedSurface, choose_shape

ANYWHERE = 1000
"""Number of candidates all over the space."""
KEPT = 5
"""Number of best candidates around which others are drawn."""
COPIES = 60
"""Number of candidates drawn around each of them."""
SPREADS = (0.1, 0.03, 0.01)
"""Standard deviations of these, round by round, as shares of a key's range."""

MODELLED = 500
"""Most points with a cost that the model holds: its time grows with their third power."""


class GeometrySampler(BaseSampler):
    """Draws a trial's values together, by expected improvement, for one space without branches."""

    def __init__(
        self, geometry: AdapterGeometry, seed: int, n_startup_trials: int, looks_are_values: bool
    ) -> None:
        """
        Args:
            geometry: the space and its coordinates.
            seed: of the draws.
            n_startup_trials: number of trials with an answer before which draws are random.
            looks_are_values: see `observe`.
        """
        self._geometry = geometry
        self._seed = seed
        self._startup = n_startup_trials
        self._looks_are_values = looks_are_values

    def reseed_rng(self) -> None:
        """See BaseSampler: no draw depends on a random state."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See BaseSampler."""
        return {key: distribution_of(domain) for key, domain in self._geometry.space.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See BaseSampler. Until enough is known, values are drawn one by one instead."""
        others = [
            other for other in study.get_trials(deepcopy=False) if other.number != trial.number
        ]
        sign = 1.0 if study.direction is StudyDirection.MINIMIZE else -1.0
        seen = observe(others, self._geometry, sign, self._looks_are_values)
        if not self._geometry.space or not len(seen.costs) or seen.known < self._startup:
            return {}
        # values that a user has given for a queued trial
        fixed: dict[str, Scalar] = trial.system_attrs.get("fixed_params", {})
        # one thread: the sums of several depend on their number, and draws must not
        with threadpool_limits(limits=1):
            return self._best_point(seen, fixed)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """See BaseSampler."""
        random = RandomSampler(self._seed)
        return random.sample_independent(study, trial, param_name, param_distribution)

    def _best_point(self, seen: ObservedTrials, fixed: Mapping[str, Scalar]) -> dict[str, Any]:
        given = {
            key: value
            for key, value in fixed.items()
            if key in self._geometry.space and self._geometry.allows(key, value)
        }
        candidates = CandidatePoints(self._geometry, np.random.default_rng(self._seed), given)
        known = candidates.rows(best_of(seen))
        rows = np.concatenate(
            [candidates.anywhere(ANYWHERE), candidates.near(known, COPIES, SPREADS[0])]
        )
        promise = PointPromise(self._geometry, seen, candidates.columns(rows) if given else None)
        for spread in SPREADS:
            scores = promise.of(candidates.columns(rows))
            best = rows[np.argsort(-scores, kind="stable")[:KEPT]]
            rows = np.concatenate([best, candidates.near(best, COPIES, spread)])
        columns = candidates.columns(rows)
        return self._geometry.draw_at(columns, int(np.argmax(promise.of(columns))))


class PointPromise:
    """Rates points by what a training there promises, from what is known of other points."""

    def __init__(
        self, geometry: AdapterGeometry, seen: ObservedTrials, allowed: Columns | None = None
    ) -> None:
        """
        Args:
            geometry: of the space.
            seen: what is known.
            allowed: points to which a user's values confine the choice, or None without any.
        """
        self._surface = surface_of(geometry, seen)
        self._best = _within_reach(self._surface, allowed)
        self._tried = tried_rows(seen)

    def of(self, columns: Columns) -> NDArray[np.float64]:
        """Return the promise of each point. That of a point that was tried is below every other."""
        found = self._surface.expected_improvement(columns, self._best)
        # a point that was tried is answered from the record, so it would teach nothing. The ends of a
        # range come again, too
        again = np.array([row in self._tried for row in as_rows(columns)])
        return np.where(again, -1.0, found)


def distribution_of(domain: Domain) -> BaseDistribution:
    """Return Optuna's distribution of a domain, as `suggest` of the study asks for it."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    if domain.integer:
        return IntDistribution(
            int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1)
        )
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def surface_of(geometry: AdapterGeometry, seen: ObservedTrials) -> FittedSurface:
    """Return the surface of the costs on their log scale."""
    kept = modelled(seen.costs)
    values = log_above_best(seen.costs)[kept]
    valued = {key: column[kept] for key, column in seen.valued.items()}
    surface = FittedSurface(geometry, choose_shape(geometry, valued, values), valued, values)
    if impossible := count_of(seen.infeasible):
        # the mean: a worse value would keep the search far from a border at which the best points may
        # lie, and a smooth border of its own never learns that r=33 is too much where r=32 is not
        surface = surface.with_values(seen.infeasible, np.zeros(impossible))
    return surface.believing(seen.pending) if count_of(seen.pending) else surface


def modelled(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the points to model: the best half, and others from good to bad."""
    order = np.argsort(costs, kind="stable")
    if len(order) <= MODELLED:
        return np.sort(order)
    best, others = order[: MODELLED // 2], order[MODELLED // 2 :]
    places = np.linspace(0, len(others) - 1, MODELLED - len(best)).round().astype(int)
    return np.sort(np.concatenate([best, others[places]]))


def best_of(seen: ObservedTrials, count: int = KEPT) -> Columns:
    """Return the points of lowest cost, near which the best candidates often lie."""
    best = np.argsort(seen.costs, kind="stable")[:count]
    return {key: column[best] for key, column in seen.valued.items()}


def _within_reach(surface: FittedSurface, allowed: Columns | None) -> float:
    """Return the value to improve on: the best one, or the best mean of the allowed points."""
    if allowed is None:
        return surface.best
    # a best value that none of them reaches would prefer the point of which least is known
    mean, _ = surface.predict(allowed)
    return max(surface.best, float(mean.min()))


def tried_rows(seen: ObservedTrials) -> set[tuple[float, ...]]:
    """Return every point of the record as a row of values."""
    return {
        row for columns in (seen.valued, seen.infeasible, seen.pending) for row in as_rows(columns)
    }


def as_rows(columns: Columns) -> list[tuple[float, ...]]:
    """Return each point as a row of values that can be compared with those of other points."""
    # low + n * step has rounding errors
    rounded = (np.round(column, 12).tolist() for column in columns.values())
    return list(zip(*rounded, strict=True))
