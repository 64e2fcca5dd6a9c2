"""Optuna's samplers by the names of conf/sampler.

Only sampler=gp and some classes of sampler=optuna load torch and scipy into the driver.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.settings import SamplerSettings
from sweeper.config.space import Space, conditional
from sweeper.core.errors import ConfigError
from sweeper.search.record_prefix import turn_of

UNFIT = dict.fromkeys(
    ("GridSampler", "BruteForceSampler"), "ends with an error when its points are used up"
)
"""Optuna's samplers that do not work with ask and tell, each with the reason."""


def make_sampler(settings: SamplerSettings, space: Space, n_trials: int) -> BaseSampler:
    """Return the sampler of an arm.

    Raises:
        ConfigError: Optuna has no such class, or the class does not take these arguments.
    """
    _make(settings, space, n_trials, settings.seed)  # what cannot be made is refused here
    one_space = settings.name in {"tpe", "gp"} and not conditional(space)
    return SeededDraws(
        lambda seed: _make(settings, space, n_trials, seed), settings.seed, one_space
    )


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


def _make(settings: SamplerSettings, space: Space, n_trials: int, seed: int) -> BaseSampler:
    # A fifth of the trials, because Optuna's fixed default of 10 would leave a study of 12 to
    # random search.
    startup = settings.n_startup_trials or max(4, n_trials // 5)
    match settings.name:
        case "tpe":
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
