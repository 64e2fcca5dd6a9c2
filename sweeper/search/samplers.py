"""Optuna's samplers by the names of conf/sampler.

Only sampler=gp and some classes of sampler=optuna load torch and scipy into the driver.
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
"""Optuna's samplers that do not work with ask and tell, each with the reason."""


def make_sampler(settings: SamplerSettings, space: Space, n_trials: int, drawn: int) -> BaseSampler:
    """Return the sampler of an arm.

    A sampler's random state is not stored. The seed therefore moves with the number of values drawn
    so far. With a fixed seed a resumed study would repeat its first draws.

    Raises:
        ConfigError: Optuna has no such class, or the class does not take these arguments.
    """
    # Counting trials instead of values would repeat a point: an orphan's values may be drawn by
    # one run and a new trial asked by the next.
    seed = settings.seed + drawn
    # A fifth of the trials, because Optuna's fixed default of 10 would leave a study of 12 to
    # random search.
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
    """Return a multivariate TPE sampler, grouped by branch where the space has branches."""
    # Grouping is experimental in Optuna, so it is used only where branches need it.
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
