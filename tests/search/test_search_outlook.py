"""What further trials would bring: the guess against trials that were made, and when there is none."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.config.space import Branch, Branches, Choice, Interval, Space
from sweeper.search.adapter_geometry import RANK, AdapterGeometry, Columns
from sweeper.search.geometry_sampler import distribution_of
from sweeper.search.observed_trials import CostScale, observe
from sweeper.search.record_prefix import TURN
from sweeper.search.search_outlook import (
    LEAST,
    OUTLOOK,
    SearchOutlook,
    guess_outlook,
    store_outlook,
    stored_outlook,
)
from sweeper.search.simulated_search import FUNCTIONS, _draw, _search, simulated_gains
from sweeper.search.study import suggest
from sweeper.search.study_plan import StudyPlan, studies
from sweeper.search.surface_model import FittedSurface, SurfaceShape, expected_improvement
from sweeper.search.telling import INFEASIBLE
from tests.search.test_geometry_sampler import SPACE, _sampler, loss

LINE: Space = {"x": Interval(0.0, 1.0)}
PLAIN = AdapterGeometry(LINE, None)  # type: ignore[arg-type]


@cache
def _plan() -> StudyPlan:
    (plan,) = studies(["+experiment=lr_rank_sweep", "workers=fake", "tracking=none"])
    return plan


def _guess(study: optuna.Study, space: Space = LINE, **changes: Any) -> SearchOutlook | None:
    arm = replace(_plan().arms[0], space=space, **changes)
    return guess_outlook(study, _plan(), arm)


def _trial(
    x: float,
    value: float | None,
    place: int,
    state: TrialState = TrialState.COMPLETE,
    infeasible: float = -1.0,
    space: Space = LINE,
    looks: dict[int, float] | None = None,
) -> FrozenTrial:
    ended: dict[str, Any] = (
        {"constraints": {INFEASIBLE: infeasible}} if state is TrialState.COMPLETE else {}
    )
    return create_trial(
        state=state,
        value=value,
        params={"x": x},
        distributions={"x": distribution_of(space["x"])},  # type: ignore[arg-type]
        intermediate_values=looks or {},
        user_attrs={"cause": "finished", "counts": True, TURN: [place, 0]},
        **ended,
    )


def _study(*trials: FrozenTrial, direction: str = "minimize") -> optuna.Study:
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return study


def _curve(count: int, sign: float = 1.0, factor: float = 1.0, shift: float = 0.0) -> Any:
    """Trials of a wavy function on places that leave a valley between them."""
    places = np.random.default_rng(1).random(count)
    values = 3 + np.cos(9 * places) * places
    return [
        _trial(float(x), sign * (factor * float(value) + shift), place)
        for place, (x, value) in enumerate(zip(places, values, strict=True))
    ]


def test_the_guess_is_of_the_size_of_what_further_trials_bring() -> None:
    """Ten simulated studies: the mean of the guesses after 8 trials against 8 trials that follow."""
    adapter = _plan().arms[0].settings.adapter
    geometry = AdapterGeometry(SPACE, adapter)  # type: ignore[arg-type]
    guessed, brought = [], []
    for seed in range(10):
        study = optuna.create_study(sampler=_sampler(seed))
        for count in range(1, 17):
            trial = study.ask()
            study.tell(trial, loss(suggest(trial, SPACE)))
            if count == 8:
                seen = observe(study.get_trials(), geometry, 1.0, True)
                guessed.append(float(simulated_gains(geometry, seen, 8)[0].mean()))
                before = study.best_value
        brought.append(before - study.best_value)
    assert np.mean(brought) > 0
    assert 1 / 3 < np.mean(guessed) / np.mean(brought) < 3


def test_where_the_best_point_is_found_little_is_expected() -> None:
    """A parabola that was tried at and around its lowest point, against one with a gap there."""
    places = np.linspace(0, 1, 21)
    tried = [_trial(float(x), (float(x) - 0.5) ** 2, n) for n, x in enumerate(places)]
    found = _guess(_study(*tried))
    gap = _guess(_study(*(t for t in tried if abs(t.params["x"] - 0.5) > 0.2)))
    assert found is not None
    assert gap is not None
    assert 0 <= found.low <= found.gain < 0.002
    assert gap.gain > 0.02  # of 0.04 at most


def test_a_simulated_step_is_one_of_the_surface() -> None:
    """Every further value changes means and deviations as a surface through that value has them."""
    values = np.array([1.0, -0.6, 0.2])
    surface = FittedSurface(
        PLAIN, SurfaceShape(other=0.6), {"x": np.array([0.1, 0.4, 0.9])}, values
    )
    columns: Columns = {"x": np.linspace(0, 1, 41)}
    mean, covariance = surface.joint(columns)
    functions = _draw(mean, covariance, 1e-8, np.random.default_rng(5))[:3]
    lowest = _search(mean, covariance, functions, surface, 6, np.random.default_rng(7))
    noise = np.random.default_rng(7)
    noises = np.array([noise.normal(0, np.sqrt(surface.noise), 3) for _ in range(6)])
    expected = []
    for number, function in enumerate(functions):
        known, best, chosen = surface, surface.best, []
        for step in range(6):
            promise = expected_improvement(*known.predict(columns), best)
            promise[chosen] = -1.0
            chosen.append(int(np.argmax(promise)))
            measured = function[chosen[-1]] + noises[step, number]
            best = min(best, float(measured))
            place = {"x": columns["x"][chosen[-1:]]}
            known = known.with_values(place, np.array([measured]))
        expected.append(function[chosen].min())
    assert len(expected) == 3
    assert lowest == pytest.approx(expected)


def test_functions_are_drawn_from_the_surface() -> None:
    """Their means and covariances are those of the process, within what 64 draws tell."""
    surface = FittedSurface(
        PLAIN, SurfaceShape(other=0.6), {"x": np.array([0.1, 0.5])}, np.array([1.0, -1.0])
    )
    mean, covariance = surface.joint({"x": np.linspace(0, 1, 5)})
    predicted, deviation = surface.predict({"x": np.linspace(0, 1, 5)})
    assert mean == pytest.approx(predicted)
    assert np.sqrt(np.diag(covariance)) == pytest.approx(deviation)
    drawn = [_draw(mean, covariance, 1e-8, np.random.default_rng(n)) for n in range(50)]
    functions = np.concatenate(drawn)
    assert len(functions) == 50 * FUNCTIONS
    assert functions.mean(axis=0) == pytest.approx(mean, abs=0.08)
    assert np.cov(functions.T) == pytest.approx(covariance, abs=0.1)


def test_a_scale_gives_back_the_costs() -> None:
    """The way back from the log scale, up to what counts as equally bad."""
    costs = np.array([3.5, 3.6, 3.55, 4.0, 3.52])
    scale = CostScale.of(costs)
    assert scale.costs(scale.values(costs)) == pytest.approx(costs)
    assert scale.costs(np.array([-50.0])) == pytest.approx(3.5 - scale.unit)


def test_the_same_record_gives_the_same_guess_in_the_unit_of_its_values() -> None:
    """In any order of arrival; ten times the costs bring ten times as much, wherever they lie."""
    trials = _curve(12)
    found = _guess(_study(*trials))
    assert found is not None
    assert found == _guess(_study(*trials)) == _guess(_study(*trials[::-1]))
    moved = _guess(_study(*_curve(12, factor=10.0, shift=7.0)))
    assert moved is not None
    assert (moved.gain, moved.high) == pytest.approx((10 * found.gain, 10 * found.high), rel=1e-3)
    assert 0 <= found.low < found.gain < found.high
    assert (found.after, found.trials) == (12, 12)


def test_a_maximised_objective_gains_as_much() -> None:
    """With every sign reversed, an improvement is a positive number too."""
    assert _guess(_study(*_curve(12, sign=-1.0), direction="maximize")) == _guess(
        _study(*_curve(12))
    )


def test_no_guess_without_a_model() -> None:
    """Branches, several objectives, a grid, an empty space, few trials, and a space that is used up."""
    study = _study(*_curve(12))
    branch = Branch({}, {})
    branches = Branches(Choice(("a", "b")), {"a": branch, "b": branch})
    assert _guess(study, {**LINE, "y": branches}) is None
    two = replace(_plan(), study=_plan().study.model_copy(update={"costs": ["cost/seconds"]}))
    assert guess_outlook(study, two, replace(_plan().arms[0], space=LINE)) is None
    sampler = _plan().arms[0].sampler
    assert _guess(study, sampler=sampler.model_copy(update={"name": "grid"})) is None
    assert _guess(study, sampler=sampler.model_copy(update={"name": "random"})) is not None
    assert _guess(study, {}) is None
    assert _guess(_study(*_curve(LEAST - 1))) is None
    assert _guess(_study(*_curve(LEAST))) is not None
    few: Space = {"x": Choice(tuple(n / 10 for n in range(10)))}
    tried = [_trial(n / 10, float(n % 4), n, space=few) for n in range(10)]
    assert _guess(_study(*tried), few) is None
    left = _guess(_study(*tried[:8]), few)
    assert left is not None
    assert (left.after, left.trials) == (8, 2)


def test_stopped_and_impossible_trials_are_heard() -> None:
    """Stopped trials count as points with a cost. Impossible ones are no cost, and stay untried."""
    ended = [
        _trial(float(x), 3 + float(x), n, looks={250: 3.1 + float(x)})
        for n, x in enumerate(np.linspace(0.3, 0.7, 6))
    ]
    stopped = [
        _trial(0.9 + n / 50, None, 6 + n, TrialState.PRUNED, looks={250: 4.2}) for n in range(3)
    ]
    impossible = [_trial(n / 50, 4.5, 9 + n, infeasible=1.0) for n in range(3)]
    assert _guess(_study(*ended, *impossible)) is None
    found = _guess(_study(*ended, *stopped, *impossible))
    assert found is not None
    assert (found.after, found.trials) == (12, 12)
    without = _guess(_study(*ended, *stopped))
    assert without is not None
    assert found.gain != without.gain


def test_a_stored_guess_counts_until_the_study_has_more_trials() -> None:
    """Studies of before have none. A further trial makes the guess stale until it is made again."""
    plan, arm = _plan(), replace(_plan().arms[0], space=LINE)
    trials = _curve(10)
    study = _study(*trials[:9])
    assert stored_outlook(study) is None
    store_outlook(study, plan, arm)
    found = stored_outlook(study)
    assert found == guess_outlook(study, plan, arm)
    assert found is not None
    # a guess that is there for these trials is kept, whatever a later version would say
    study.set_user_attr(OUTLOOK, found.model_copy(update={"gain": 9.0}).model_dump())
    store_outlook(study, plan, arm)
    assert study.user_attrs[OUTLOOK]["gain"] == 9.0
    study.add_trial(trials[9])
    assert stored_outlook(study) is None
    store_outlook(study, plan, arm)
    extended = stored_outlook(study)
    assert extended is not None
    assert (extended.after, extended.trials) == (10, 10)


def test_a_study_without_a_guess_stores_that() -> None:
    """A short study ends without one, and does not keep an earlier one."""
    study = _study(*_curve(3))
    store_outlook(study, _plan(), replace(_plan().arms[0], space=LINE))
    assert study.user_attrs[OUTLOOK] is None
    assert stored_outlook(study) is None


@pytest.mark.parametrize("count", [30, 600])
def test_a_guess_takes_less_than_two_seconds(count: int) -> None:
    """In the product's space, the least CPU time of three."""
    adapter = _plan().arms[0].settings.adapter
    source = optuna.create_study(sampler=RandomSampler(seed=0))
    for _ in range(count):
        trial = source.ask()
        source.tell(trial, loss(suggest(trial, SPACE)))
    geometry = AdapterGeometry(SPACE, adapter)  # type: ignore[arg-type]
    seen = observe(source.get_trials(), geometry, 1.0, True)
    took = []
    for _ in range(3):
        began = time.process_time()
        simulated_gains(geometry, seen, 24)
        took.append(time.process_time() - began)
    assert min(took) < 2.0
    assert RANK in seen.valued
