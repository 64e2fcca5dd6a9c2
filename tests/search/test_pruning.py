"""The guard around Optuna's pruner."""

from __future__ import annotations

import optuna
import pytest

from sweeper.search.pruning import make_pruner, may_prune, permille, should_prune
from sweeper.settings import Pruner
from tests.conftest import make_settings

PRUNER = Pruner(name="median", n_startup_trials=2, min_fraction=0.34)


@pytest.mark.parametrize(
    ("overrides", "step", "allowed"),
    [
        (["training.warmup_ratio=0.1"], 33, False),
        (["training.warmup_ratio=0.1"], 35, True),
        (["training.warmup_ratio=0.5"], 50, False),
        (["training.warmup_ratio=0.5"], 51, True),
        (["training.warmup_steps=60"], 60, False),
        (["training.warmup_steps=60"], 61, True),
        (["training.warmup_ratio=0.1"], 100, False),
    ],
)
def test_no_decision_before_warmup_ends(overrides: list[str], step: int, allowed: bool) -> None:
    """A trial of 100 steps may be stopped only after warm-up, after 34 steps, and before its end."""
    assert may_prune(PRUNER, make_settings(*overrides).training, step, 100) is allowed


def test_trials_are_compared_at_the_same_fraction_of_the_schedule() -> None:
    """Half of 50 steps and half of 100 steps are the same step to Optuna."""
    assert permille(25, 50) == permille(50, 100) == 500


def test_a_hopeless_trial_is_stopped_only_when_the_guard_lets_it() -> None:
    """Worse than the median of finished trials: pruned at half-way, untouched during warm-up."""
    study = optuna.create_study(pruner=make_pruner(PRUNER))
    for value in (1.0, 1.1, 1.2):
        trial = study.ask()
        for step in (100, 500, 1000):
            trial.report(value, step)
        study.tell(trial, value)
    hopeless = study.ask()
    training = make_settings().training
    hopeless.report(9.0, 100)
    assert not should_prune(PRUNER, training, hopeless, 10, 100)
    hopeless.report(9.0, 500)
    assert should_prune(PRUNER, training, hopeless, 50, 100)


def test_none_never_prunes() -> None:
    """pruner=none lets every trial end by itself."""
    study = optuna.create_study(pruner=make_pruner(PRUNER.model_copy(update={"name": "none"})))
    for value in (1.0, 1.1, 1.2):
        trial = study.ask()
        trial.report(value, 500)
        study.tell(trial, value)
    trial = study.ask()
    trial.report(9.0, 500)
    assert not trial.should_prune()
