"""Show choices between numbers to a sampler in their order.

Optuna stores a choice as a categorical parameter, whose values have no order for any sampler: that a
rank of 8 lies between 4 and 16 would be learnt point by point. The sampler therefore sees the place
of each number among the sorted ones, as a whole number. The storage, its trials and Optuna's tools
keep the numbers themselves, so a study can be continued with or without this view.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

FEWEST = 3
"""Fewest numbers whose order says anything: with two, each is simply the other's neighbour."""


def numbers_of(values: Sequence[Any]) -> tuple[int | float, ...] | None:
    """Return values in rising order if all of them are different numbers, else None."""
    # by type, because True is an int in Python
    if any(type(value) not in (int, float) for value in values) or len(set(values)) < len(values):
        return None
    return tuple(sorted(values))


class OrderedChoiceSampler(BaseSampler):
    """A sampler to which choices between numbers are shown as places in their order."""

    def __init__(self, sampler: BaseSampler) -> None:
        """
        Args:
            sampler: sees the places and draws them.
        """
        self._sampler = sampler

    def reseed_rng(self) -> None:
        """See BaseSampler."""
        self._sampler.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See BaseSampler."""
        self._sampler.before_trial(_as_ordered(study), with_places(trial))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See BaseSampler."""
        shown = self._sampler.infer_relative_search_space(_as_ordered(study), with_places(trial))
        # Optuna compares this space with what is suggested, which is the choice itself
        stored = _ordered_choices(study) if shown else {}
        return {name: stored.get(name, distribution) for name, distribution in shown.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        shown = {name: _shown(distribution) for name, distribution in search_space.items()}
        drawn = self._sampler.sample_relative(_as_ordered(study), with_places(trial), shown)
        return {name: _stored_value(search_space[name], value) for name, value in drawn.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """See BaseSampler."""
        value = self._sampler.sample_independent(
            _as_ordered(study), with_places(trial), param_name, _shown(param_distribution)
        )
        return _stored_value(param_distribution, value)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """See BaseSampler."""
        self._sampler.after_trial(_as_ordered(study), with_places(trial), state, values)


class OrderedStudy:
    """A study that shows ordered choices of its trials as places, and passes everything else on."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        """See optuna.Study."""
        return self.get_trials()

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See optuna.Study."""
        return [with_places(trial) for trial in self._study.get_trials(deepcopy, states)]

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        # Optuna's own samplers read a study's trials by this name
        found = self._study._get_trials(deepcopy, states, use_cache)
        return [with_places(trial) for trial in found]


def with_places(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial whose ordered choices are places among their sorted numbers."""
    ordered = _ordered_of(trial.distributions)
    if not ordered:
        return trial
    # a copy, because without deepcopy a storage hands out the trials of its cache
    shown = copy.copy(trial)
    places = {
        name: numbers.index(trial.params[name])
        for name, numbers in ordered.items()
        if name in trial.params
    }
    shown.params = {**trial.params, **places}
    shown.distributions = {name: _shown(each) for name, each in trial.distributions.items()}
    return shown


def _as_ordered(study: optuna.Study) -> optuna.Study:
    return cast(optuna.Study, OrderedStudy(study))


def _ordered(distribution: BaseDistribution) -> tuple[int | float, ...] | None:
    """Return the sorted numbers of a choice whose order says something, else None."""
    if not isinstance(distribution, CategoricalDistribution) or len(distribution.choices) < FEWEST:
        return None
    return numbers_of(distribution.choices)


def _ordered_of(
    distributions: Mapping[str, BaseDistribution],
) -> dict[str, tuple[int | float, ...]]:
    found = {name: _ordered(each) for name, each in distributions.items()}
    return {name: numbers for name, numbers in found.items() if numbers is not None}


def _ordered_choices(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Return the stored distribution of every ordered choice that any trial has drawn."""
    found: dict[str, BaseDistribution] = {}
    for trial in study._get_trials(deepcopy=False):
        known = trial.distributions
        found.update((name, known[name]) for name in known.keys() - found.keys())
    return {name: each for name, each in found.items() if _ordered(each) is not None}


def _shown(distribution: BaseDistribution) -> BaseDistribution:
    numbers = _ordered(distribution)
    return distribution if numbers is None else IntDistribution(0, len(numbers) - 1)


def _stored_value(distribution: BaseDistribution, value: Any) -> Any:
    """Return the number at a drawn place, or the drawn value where the choice has no order."""
    numbers = _ordered(distribution)
    return value if numbers is None else numbers[int(value)]
