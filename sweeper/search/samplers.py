"""Samplers by the names of conf/sampler: Optuna's, and the one that knows LoRA's geometry.

Only sampler=gp and some classes of sampler=optuna load torch into the driver. sampler=lora loads
scikit-learn.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.settings import LoraAdapter, SamplerSettings
from sweeper.config.space import Branches, Space, conditional
from sweeper.core.errors import ConfigError
from sweeper.search.adapter_geometry import AdapterGeometry
from sweeper.search.ordered_choices import OrderedChoiceSampler
from sweeper.search.record_prefix import turn_of

IN_ORDER = ("gp", "optuna")
"""Samplers of Optuna's that see choices between numbers in their order. TPE searches no better with it,
and after 24 trials worse (docs/search.md, Samplers). Random draws have no use for it."""
UNFIT = dict.fromkeys(
    ("GridSampler", "BruteForceSampler"), "ends with an error when its points are used up"
)
"""Optuna's samplers that do not work with ask and tell, each with the reason."""


@dataclass(frozen=True)
class SamplerContext:
    """Properties of an arm that a sampler goes by in addition to its space."""

    adapter: LoraAdapter | None = None
    """The adapter before any point is applied, or None where every weight is trained."""
    objectives: int = 1
    """Number of metrics that are minimised or maximised."""
    looks_are_values: bool = True
    """True if looks measure the objective, False if they measure another metric."""
    ordered: bool = True
    """True if the samplers of IN_ORDER see choices between numbers in their order."""


PLAIN = SamplerContext()
"""The context of a space alone."""


def make_sampler(
    settings: SamplerSettings, space: Space, n_trials: int, context: SamplerContext = PLAIN
) -> BaseSampler:
    """Return the sampler of an arm.

    Raises:
        ConfigError: Optuna has no such class, or the class does not take these arguments.
    """

    def make(seed: int) -> BaseSampler:
        return _make(settings, space, n_trials, seed, context)

    make(settings.seed)  # what cannot be made is refused here
    one_space = settings.name in {"tpe", "gp"} and not conditional(space)
    return SeededDraws(make, settings.seed, one_space)


def outside_geometry(space: Space, objectives: int) -> str | None:
    """Return why sampler=lora cannot model a search, or None if it can."""
    if conditional(space):
        return "this space has branches"
    if objectives > 1:
        return "this search has several objectives"
    return None


class SeededDraws(BaseSampler):
    """A sampler each of whose draws follows from a seed, the trial's place, and the record.

    Optuna's samplers keep a random state and a memory of earlier draws that is not stored. Here every
    trial, and every value that is drawn on its own, gets a new sampler of the configured kind.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], seed: int, one_space: bool = False
    ) -> None:
        """
        Args:
            make: returns a sampler with a seed.
            seed: the arm's.
            one_space: True if the samplers draw together what all trials of the record have in
                common. Each then compares only trials that are new.
        """
        self._make = make
        self._seed = seed
        self._of_trial: tuple[int, BaseSampler] | None = None
        self._one_space = one_space
        self._inferring: tuple[int, BaseSampler] | None = None
        """The number of places whose trials are known to the sampler that infers the common space."""

    def reseed_rng(self) -> None:
        """See BaseSampler: no draw depends on a random state."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See BaseSampler."""
        self._whole(trial).before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See BaseSampler."""
        sampler = self._with_space(trial) if self._one_space else self._whole(trial)
        return sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        return self._whole(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """See BaseSampler."""
        # seeded by name: values that a killed driver has drawn take no part in those after them
        sampler = self._make(self._seed_of(trial, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """See BaseSampler."""
        self._whole(trial).after_trial(study, trial, state, values)

    def _whole(self, trial: FrozenTrial) -> BaseSampler:
        """Return the sampler that draws a trial's values together."""
        if self._of_trial is None or self._of_trial[0] != trial.number:
            self._of_trial = trial.number, self._make(self._seed_of(trial, ""))
        return self._of_trial[1]

    def _with_space(self, trial: FrozenTrial) -> BaseSampler:
        """Return the sampler that remembers what the trials before this one have in common."""
        # a new one for each trial would compare the domains of all trials again
        reads = turn_of(trial).reads
        known = self._inferring
        sampler = self._make(self._seed) if known is None or known[0] > reads else known[1]
        self._inferring = reads, sampler
        return sampler

    def _seed_of(self, trial: FrozenTrial, name: str) -> int:
        words = f"{self._seed}/{turn_of(trial).place}/{name}"
        # four bytes: numpy's RandomState, which Optuna's samplers hold, takes seeds below 2**32
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")


def _make(
    settings: SamplerSettings, space: Space, n_trials: int, seed: int, context: SamplerContext
) -> BaseSampler:
    # A fifth of the trials, because Optuna's fixed default of 10 would leave a study of 12 to
    # random search.
    startup = settings.n_startup_trials or max(4, n_trials // 5)
    if settings.name == "lora" and outside_geometry(space, context.objectives) is None:
        return _with_geometry(space, startup, seed, context)
    sampler = _of_optuna(settings, space, startup, seed)
    if context.ordered and settings.name in IN_ORDER:
        return OrderedChoiceSampler(sampler)
    return sampler


def _with_geometry(space: Space, startup: int, seed: int, context: SamplerContext) -> BaseSampler:
    # importing scikit-learn would slow the start of every study, and no other sampler needs it
    from sweeper.search.geometry_sampler import GeometrySampler

    domains = {key: domain for key, domain in space.items() if not isinstance(domain, Branches)}
    geometry = AdapterGeometry(domains, context.adapter)
    return GeometrySampler(geometry, seed, startup, context.looks_are_values)


def _of_optuna(settings: SamplerSettings, space: Space, startup: int, seed: int) -> BaseSampler:
    match settings.name:
        case "tpe" | "lora":
            return _tpe(startup, seed, group=conditional(space))
        case "gp":
            # the parameters of a branch are always drawn independently, which is no news for a user
            return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case "random" | "grid":  # the grid's points are enqueued, so nothing is left to draw
            return RandomSampler(seed)
        case "optuna":
            return _by_class_name(settings, seed)


def _tpe(startup: int, seed: int, group: bool) -> TPESampler:
    """Return a multivariate TPE sampler, grouped by branch where the space has branches."""
    # Grouping is experimental in Optuna, so it is used only where branches need it.
    if not group:
        return TPESampler(n_startup_trials=startup, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Optuna refuses group without multivariate
        return TPESampler(n_startup_trials=startup, seed=seed, multivariate=True, group=True)


def _by_class_name(settings: SamplerSettings, seed: int) -> BaseSampler:
    assert settings.class_name is not None
    if settings.class_name in UNFIT:
        raise ConfigError(
            [f"sampler.class_name={settings.class_name} {UNFIT[settings.class_name]}: sampler=grid"]
        )
    arguments = dict(settings.kwargs)
    sampler = getattr(optuna.samplers, settings.class_name, None)
    if sampler is not None and "seed" in inspect.signature(sampler).parameters:
        # a quasi-random sequence goes on where the storage says it stands, so its seed must stay
        moves = settings.class_name != "QMCSampler"
        arguments.setdefault("seed", seed if moves else settings.seed)
    made = make_by_class_name(optuna.samplers, settings.class_name, arguments, "sampler")
    assert isinstance(made, BaseSampler)
    return made


def make_by_class_name(
    module: ModuleType, class_name: str, arguments: dict[str, Any], group: str
) -> object:
    """Return an instance of one of Optuna's own classes.

    Raises:
        ConfigError: there is no such class, or the class does not take these arguments.
    """
    known = sorted(name for name in module.__all__ if not name.startswith("Base"))
    names = [name for name in known if isinstance(getattr(module, name), type)]
    if class_name not in names:
        raise ConfigError(
            [f"{group}.class_name={class_name}: no such class. Valid: {', '.join(names)}"]
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return getattr(module, class_name)(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            [f"{group}.class_name={class_name} with kwargs={arguments}: {error}"]
        ) from None
