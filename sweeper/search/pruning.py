"""When a trial may be stopped: Optuna's pruner behind a guard that knows the schedule.

The step told to Optuna is the per-mille of the trial's own schedule, so that trials are compared at
the same fraction of it.
"""

from __future__ import annotations

from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import Trial

from sweeper.settings import Pruner, Training


def make_pruner(settings: Pruner) -> BasePruner:
    """Optuna's pruner; the guard is `may_prune`."""
    if settings.name == "none":
        return NopPruner()
    return MedianPruner(n_startup_trials=settings.n_startup_trials, n_warmup_steps=0)


def permille(step: int, total_steps: int) -> int:
    """The fraction of the schedule that Optuna sees as a step."""
    return round(1000 * step / total_steps)


def may_prune(settings: Pruner, training: Training, step: int, total_steps: int) -> bool:
    """Whether a decision is allowed at all: after warm-up and `min_fraction`, before the end."""
    warmup = training.warmup_length(total_steps)
    return max(warmup, settings.min_fraction * total_steps) < step < total_steps


def should_prune(
    settings: Pruner, training: Training, trial: Trial, step: int, total_steps: int
) -> bool:
    """Ask Optuna's pruner, if the guard lets it speak."""
    return may_prune(settings, training, step, total_steps) and trial.should_prune()
