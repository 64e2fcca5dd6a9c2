"""Stopping by the gap to the best look, in units of the looks' noise."""

from __future__ import annotations

import random

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from sweeper.config.settings import PrunerSettings
from sweeper.core.errors import ConfigError
from sweeper.search.gap_pruner import GapPruner, last_differences, usual_spread
from sweeper.search.pruning import make_pruner
from sweeper.search.study_plan import studies
from sweeper.search.telling import INFEASIBLE

GAP = PrunerSettings(
    name="gap",
    rungs=[250, 500, 750],
    n_startup_trials=4,
    percentile=None,
    reduction_factor=None,
    class_name=None,
    kwargs={"noises": 3.0},
    audit_fraction=0.0,
)
NOISE = (0.000, 0.010, -0.010, 0.004, -0.004, 0.006)
"""Differences between the ends of six trials, without the gain that all of them share."""


def _study(
    unit: float = 1.0,
    count: int = 6,
    direction: str = "minimize",
    sign: float = 1.0,
    noise: float = 1.0,
) -> optuna.Study:
    """A study of trials whose looks at 250 are 0.02 apart from 3.60 on, all in another unit."""
    study = optuna.create_study(direction=direction, pruner=make_pruner(GAP))
    for index in range(count):
        end = 3.5 + 0.01 * index
        looks = {250: 3.60 + 0.02 * index, 500: end + 0.03, 750: end + 0.01}
        study.add_trial(
            create_trial(
                value=sign * unit * (end + noise * NOISE[index]),
                intermediate_values={at: sign * unit * look for at, look in looks.items()},
                constraints={INFEASIBLE: -1.0},
            )
        )
    return study


def _stops(study: optuna.Study, look: float, place: int = 250) -> bool:
    trial = study.ask()
    trial.report(look, place)
    return trial.should_prune()


SPREAD = usual_spread([noise - 0.01 for noise in NOISE])


@pytest.mark.parametrize(("noises", "stopped"), [(2.9, False), (3.1, True), (30.0, True)])
@pytest.mark.parametrize("unit", [1.0, 1.4427, 100.0])
def test_the_gap_is_in_units_of_the_noise(unit: float, noises: float, stopped: bool) -> None:
    """Three noises behind the best look, in nats, in bits, or in any other unit."""
    assert _stops(_study(unit), unit * (3.60 + noises * SPREAD)) == stopped


@pytest.mark.parametrize(("noises", "stopped"), [(2.9, False), (3.1, True)])
def test_a_maximised_objective_is_stopped_below(noises: float, stopped: bool) -> None:
    """With every sign reversed the decision is the same."""
    study = _study(direction="maximize", sign=-1.0)
    assert _stops(study, -(3.60 + noises * SPREAD)) == stopped


def test_looks_are_compared_at_the_same_place() -> None:
    """A look that is good at a quarter is bad at three quarters."""
    assert not _stops(_study(), 3.60, 250)
    assert _stops(_study(), 3.60, 750)


def test_a_noisier_record_stops_later() -> None:
    """The same gap stops a trial where looks agree with ends, and none where they do not."""
    assert _stops(_study(), 3.75)
    assert not _stops(_study(noise=10), 3.75)


def test_nothing_is_stopped_before_the_noise_is_known() -> None:
    """Three of four trials that must run to their end, however bad the look."""
    assert not _stops(_study(count=3), 9.0)
    assert _stops(_study(count=4), 9.0)


def test_stopped_trials_give_looks_and_no_noise() -> None:
    """The best look may be that of a stopped trial. One that could not be trained gives neither."""
    study = _study()
    study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values={250: 3.40}))
    assert _stops(study, 3.59)
    other = _study()
    impossible = create_trial(value=4.5, intermediate_values={250: 3.40})
    impossible.set_constraint(INFEASIBLE, 1.0)
    other.add_trial(impossible)
    assert not _stops(other, 3.59)


def test_only_the_last_place_tells_the_noise() -> None:
    """A trial that stopped early by itself has no look at three quarters."""
    early = create_trial(value=3.0, intermediate_values={250: 3.60, 500: 3.4})
    known = _study(count=2).trials
    assert last_differences([*known, early]) == pytest.approx([-0.01, 0.0])
    copied = create_trial(
        value=3.5, intermediate_values={750: 9.0}, user_attrs={"cause": "duplicate"}
    )
    assert last_differences([*known, copied]) == pytest.approx([-0.01, 0.0])


def test_the_spread_is_that_of_most_trials() -> None:
    """A normal noise has its standard deviation, and one diverging trial in six changes it little."""
    draws = random.Random(0)
    noise = [draws.gauss(0, 0.006) for _ in range(4000)]
    assert usual_spread(noise) == pytest.approx(0.006, rel=0.05)
    assert usual_spread([*NOISE, 3.0]) < 2 * usual_spread(NOISE)


@pytest.mark.parametrize("kwargs", [{}, {"noises": 0}, {"noise": 3.0}, {"noises": -1.0}])
def test_a_gap_that_means_nothing_is_refused(kwargs: dict[str, float]) -> None:
    """Missing, misspelt, zero or below."""
    with pytest.raises(ConfigError, match="pruner=gap with kwargs"):
        make_pruner(GAP.model_copy(update={"kwargs": kwargs}))


def test_an_objective_that_looks_do_not_measure_has_no_gap() -> None:
    """Looks are losses and values ROUGE: their difference is no noise."""
    overrides = ["+experiment=lr_rank_sweep", "objective=rougeL", "pruner=gap"]
    with pytest.raises(ConfigError, match=r"pruner=gap: its unit is .* Set pruner=median"):
        studies([*overrides, "evaluation.generation.num_examples=1"])
    (plan,) = studies(["+experiment=lr_rank_sweep", "pruner=gap"])
    assert isinstance(make_pruner(plan.study.pruner), GapPruner)
