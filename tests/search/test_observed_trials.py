"""Trials that ended, were stopped, could not be trained, or still run, as sampler=lora reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.config.space import Interval
from sweeper.search.adapter_geometry import AdapterGeometry
from sweeper.search.observed_trials import (
    ObservedTrials,
    count_of,
    log_above_best,
    log_unit,
    observe,
)
from sweeper.search.record_prefix import TURN

LINE = AdapterGeometry({"x": Interval(0.0, 1.0)}, None)


def _trial(
    x: float,
    value: float | None = None,
    state: TrialState = TrialState.COMPLETE,
    looks: dict[int, float] | None = None,
    place: int = 0,
    cause: str = "finished",
    infeasible: float = -1.0,
) -> FrozenTrial:
    constrained: dict[str, Any] = (
        {"constraints": {"infeasible": infeasible}} if state is TrialState.COMPLETE else {}
    )
    return create_trial(
        state=state,
        value=value,
        params={"x": x},
        distributions={"x": FloatDistribution(0.0, 1.0)},
        intermediate_values=looks or {},
        user_attrs={"cause": cause, TURN: [place, 0]},
        **constrained,
    )


def _stopped(x: float, looks: dict[int, float], place: int = 9) -> FrozenTrial:
    return _trial(x, None, TrialState.PRUNED, looks, place, "pruned")


def _seen(*trials: FrozenTrial, sign: float = 1.0, same_metric: bool = True) -> ObservedTrials:
    return observe(trials, LINE, sign, same_metric)


ENDED = (
    _trial(0.1, 3.40, looks={250: 3.50, 500: 3.45}, place=0),
    _trial(0.2, 3.45, looks={250: 3.60, 500: 3.50}, place=1),
    _trial(0.3, 3.50, looks={250: 3.90, 500: 3.70}, place=2),
)
"""From a quarter of the schedule on they gained 0.1, 0.15 and 0.4, from half on 0.05, 0.05 and 0.2."""


@pytest.mark.parametrize(
    ("looks", "cost"),
    [
        ({250: 3.80}, 3.65),
        ({250: 3.80, 500: 3.78}, 3.73),  # the last look decides
        ({250: 3.45}, 3.40),  # a stopped trial is never the best
        ({333: 3.80}, 3.50),  # no other trial looked there: as bad as the worst
    ],
)
def test_a_stopped_trial_costs_its_last_look_less_what_others_gained(
    looks: dict[int, float], cost: float
) -> None:
    """The median gain of those that ran to their end, from the same place of the schedule."""
    seen = _seen(*ENDED, _stopped(0.9, looks))
    assert seen.valued["x"].tolist() == [0.1, 0.2, 0.3, 0.9]
    assert seen.costs.tolist() == pytest.approx([3.40, 3.45, 3.50, cost])


def test_a_stopped_trial_of_a_maximised_objective_costs_as_much() -> None:
    """With every sign reversed the costs are the same."""
    reversed_trials = [
        _trial(
            trial.params["x"],
            -float(trial.value or 0),
            looks={step: -look for step, look in trial.intermediate_values.items()},
            place=place,
        )
        for place, trial in enumerate(ENDED)
    ]
    seen = _seen(*reversed_trials, _stopped(0.9, {250: -3.80}), sign=-1.0)
    assert seen.costs.tolist() == pytest.approx([3.40, 3.45, 3.50, 3.65])


def test_looks_of_another_metric_are_compared_and_not_added() -> None:
    """ROUGE is searched, a loss stops: the trial with the nearest look stands for the stopped one."""
    ended = (
        _trial(0.1, 0.40, looks={250: -1.0}, place=0),
        _trial(0.2, 0.30, looks={250: -2.0}, place=1),
    )
    seen = _seen(*ended, _stopped(0.9, {250: -1.8}), sign=-1.0, same_metric=False)
    assert seen.costs.tolist() == pytest.approx([-0.40, -0.30, -0.30])


def test_what_has_no_answer_is_pending() -> None:
    """A running trial, one that crashed, and one that was stopped before any other had ended."""
    running = _trial(0.5, state=TrialState.RUNNING, place=3)
    crashed = _trial(0.6, state=TrialState.FAIL, place=4, cause="crash")
    seen = _seen(*ENDED, running, crashed)
    assert seen.pending["x"].tolist() == [0.5, 0.6]
    assert (len(seen.costs), count_of(seen.infeasible), seen.known) == (3, 0, 3)
    alone = _seen(_stopped(0.9, {250: 3.8}))
    assert (alone.pending["x"].tolist(), alone.known) == ([0.9], 0)


def test_an_impossible_point_has_no_cost() -> None:
    """Its stored value is the untuned base's, which says nothing about the point."""
    seen = _seen(*ENDED, _trial(0.7, 4.5, place=5, cause="oom", infeasible=1.0))
    assert seen.infeasible["x"].tolist() == [0.7]
    assert (len(seen.costs), seen.known) == (3, 4)


def test_a_copied_result_counts_once() -> None:
    """A duplicate has the value of the trial that it repeats, and was never trained."""
    seen = _seen(*ENDED, _trial(0.1, 3.40, place=6, cause="duplicate"))
    assert len(seen.costs) == 3
    repeated = _seen(*ENDED, _trial(0.1, 3.41, place=6))  # another seed
    assert repeated.valued["x"].tolist() == [0.1, 0.2, 0.3, 0.1]


def test_how_a_running_trial_will_end_is_not_read() -> None:
    """A resumed study shows a trial as running whose attributes tell that it was a duplicate."""
    running = _trial(0.1, state=TrialState.RUNNING, place=6, cause="duplicate")
    assert _seen(*ENDED, running).pending["x"].tolist() == [0.1]


def test_trials_stand_in_the_order_in_which_they_were_asked() -> None:
    """A continued trial has a higher number and the place of the cancelled one."""
    seen = _seen(*reversed(ENDED))
    assert seen.valued["x"].tolist() == [0.1, 0.2, 0.3]


def test_a_trial_of_another_space_is_left_out() -> None:
    """A fork's trial outside the bounds, and one that was killed before it drew a value."""
    seen = _seen(
        *ENDED,
        create_trial(
            value=1.0, params={"x": 2.0}, distributions={"x": FloatDistribution(0.0, 3.0)}
        ),
        create_trial(state=TrialState.RUNNING),
    )
    assert (len(seen.costs), count_of(seen.pending)) == (3, 0)


COSTS = st.lists(st.integers(-1000, 1000), min_size=2, max_size=40).map(
    lambda values: np.array(values, dtype=float) / 8  # exact in binary, so shifts are exact
)


@given(COSTS, st.integers(-64, 64), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_the_log_scale_has_no_unit(costs: Any, shift: int, factor: float) -> None:
    """Costs in nats, in bits or above another base give one and the same surface."""
    if len(set(costs.tolist())) == 1:
        assert log_above_best(costs).tolist() == [0.0] * len(costs)
        return
    moved = log_above_best(factor * (costs + shift))
    assert moved == pytest.approx(log_above_best(costs), abs=1e-5)


@given(COSTS)
def test_a_higher_cost_is_never_lower_on_the_log_scale(costs: Any) -> None:
    """And the best stays the best."""
    logs = log_above_best(costs)
    order = np.argsort(costs, kind="stable")
    assert (np.diff(logs[order]) >= -1e-12).all()


def test_differences_near_the_best_count_more_than_those_between_bad_points() -> None:
    """0.01 nats near the best against 0.01 half a nat above; a diverged point is bad, no more."""
    costs = np.array([3.54, 3.55, 3.60, 4.00, 4.01, 6.6])
    logs = log_above_best(costs)
    assert logs[1] - logs[0] > 5 * (logs[4] - logs[3])
    worse = log_above_best(np.array([3.54, 3.55, 3.60, 4.00, 4.01, 66.0]))
    assert worse == pytest.approx(logs)


def test_the_unit_does_not_shrink_as_the_search_closes_in() -> None:
    """A hundred trials near the best would otherwise blow their noise up."""
    start = np.array([3.60, 3.70, 3.55, 3.90, 3.65])
    late = 3.54 + 0.002 * np.random.default_rng(0).random(100)
    assert log_unit(np.concatenate([start, late])) >= log_unit(start)
