"""Optuna's samplers by the names of conf/sampler.

torch and scipy come into the driver with sampler=gp (and some classes of sampler=optuna) only.
"""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from sweeper.config.settings import SamplerSettings
from sweeper.config.space import Space, conditional
from sweeper.core.errors import ConfigError

UNFIT = dict.fromkeys(
    ("GridSampler", "BruteForceSampler"), "ends with an error when its points are used up"
)
"""Optuna's samplers that do not work with ask and tell; sampler=grid does what they do."""


def make_sampler(settings: SamplerSettings, space: Space, n_trials: int, drawn: int) -> BaseSampler:
    """The sampler of an arm.

    Its random state is not stored, so the seed moves with the number of values drawn before: a resumed
    study would otherwise repeat its first draws.

    Raises:
        ConfigError: Optuna has no such class, or it does not take these arguments.
    """
    seed = settings.seed + drawn
    startup = settings.n_startup_trials or max(4, n_trials // 5)
    match settings.name:
        case "tpe":
            return _tpe(startup, seed, group=conditional(space))
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case "random" | "grid":  # the grid's points are enqueued, so nothing is left to draw
            return RandomSampler(seed)
        case "optuna":
            return _by_class_name(settings, seed)


def _tpe(startup: int, seed: int, group: bool) -> TPESampler:
    """A joint model of all parameters; of each branch's parameters where there are branches."""
    if not group:
        return TPESampler(n_startup_trials=startup, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
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
    """One of Optuna's own classes.

    Raises:
        ConfigError: there is none of that name, or it does not take these arguments.
    """
    known = sorted(name for name in module.__all__ if not name.startswith("Base"))
    names = [name for name in known if isinstance(getattr(module, name), type)]
    if class_name not in names:
        raise ConfigError(
            [f"{group}.class_name={class_name}: no such class; valid: {', '.join(names)}"]
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return getattr(module, class_name)(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            [f"{group}.class_name={class_name} with kwargs={arguments}: {error}"]
        ) from None
