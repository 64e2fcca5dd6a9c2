"""Points beside the best one of a grid: neighbouring learning rates, and another arm's warm-up.

A grid of half decades finds a rate that may be a quarter of a decade off, which costs a baseline as much
as methods differ. Two points between the best rate and its neighbours are added, and then the best point
so far with the warm-up of the LoRA winner, which searched its warm-up. A categorical parameter of Optuna
takes no new values, so a refined trial has the grid's draw and an attribute with what it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.settings import TrainingSettings
from sweeper.config.space import Choice, Point
from sweeper.core.outcome import Outcome
from sweeper.search.states import STATES
from sweeper.search.study import REFINES, point_of
from sweeper.search.study_plan import ArmPlan
from sweeper.search.telling import counts

RATE, WARMUP = "training.learning_rate", "training.warmup_ratio"
REFINE = "refine"
"""User attribute of an arm's study: True if it was opened to be refined."""


def fix_refinement(study: optuna.Study, arm: ArmPlan) -> None:
    """Store before the first trial if the arm is refined. A study of before is answered as it was."""
    if REFINE not in study.user_attrs:
        study.set_user_attr(REFINE, arm.refine and not study.get_trials(deepcopy=False))


def refined_count(trials: Iterable[FrozenTrial]) -> int:
    """Return the number of trials beside the grid, which use no budget of n_trials."""
    return sum(REFINES in trial.user_attrs for trial in trials)


def rates_beside_best(arm: ArmPlan, study: optuna.Study) -> list[Point]:
    """Return the rates between the best one of the grid and its neighbours (on the log scale)."""
    domain = arm.space.get(RATE)
    best = _best(arm, [trial for trial in _complete(study) if REFINES not in trial.user_attrs])
    if not study.user_attrs.get(REFINE) or best is None or not isinstance(domain, Choice):
        return []
    tried = {point_of(trial)[RATE] for trial in study.get_trials(deepcopy=False) if counts(trial)}
    # Beside the best of half a grid lies the other half.
    if not tried >= set(domain.values):
        return []
    rates = sorted(float(rate) for rate in domain.values if isinstance(rate, int | float))
    at = rates.index(float(point_of(best)[RATE]))  # type: ignore[arg-type]
    neighbours = [rates[place] for place in (at - 1, at + 1) if 0 <= place < len(rates)]
    return [{RATE: float(f"{math.sqrt(rates[at] * each):.3g}")} for each in neighbours]


def warmup_beside_best(arm: ArmPlan, study: optuna.Study, winner: Point) -> list[Point]:
    """Return the best point with the warm-up of the LoRA winner, if that is another one.

    Args:
        arm: the arm that is refined.
        study: its Optuna study.
        winner: the point of the LoRA arm's best trial.
    """
    best = _best(arm, _complete(study))
    warmup = winner.get(WARMUP)
    own = arm.settings.training.warmup_ratio
    if not refined_count(study.get_trials(deepcopy=False)) or best is None or WARMUP in arm.space:
        return []
    if warmup is None or warmup == own or WARMUP in point_of(best):
        return []
    return [{RATE: point_of(best)[RATE], WARMUP: warmup}]


def twin_warmup(arm: ArmPlan, study: optuna.Study, point: Point) -> int | None:
    """Return the steps of a new point's warm-up if the best point has as many, else None.

    Both are then one training: a ratio becomes whole steps, and counts for nothing where
    training.warmup_steps is set. An earlier version may have queued the point all the same.

    Args:
        arm: the arm that is refined.
        study: its Optuna study.
        point: the best point with another warm-up ratio.
    """
    best = _best(arm, _complete(study))
    total = None if best is None else _total_steps(Outcome(**best.user_attrs["outcome"]))
    if best is None or total is None or point in _refined_points(study):
        return None
    steps = [_warmup(arm, each, total) for each in (point_of(best), {**point_of(best), **point})]
    return steps[0] if steps[0] == steps[1] else None


def _total_steps(outcome: Outcome) -> int | None:
    """Return the steps of a trial's whole schedule, or None if they are not known."""
    # A trial that was stopped early made fewer steps than its schedule has.
    made = outcome.steps if outcome.cause == "finished" else None
    found = outcome.metrics.get("training/total_steps", made)
    return int(found) if found else None


def _warmup(arm: ArmPlan, point: Point, total: int) -> int:
    names = TrainingSettings.model_fields
    own = {key.removeprefix("training."): value for key, value in point.items()}
    update = {name: value for name, value in own.items() if name in names}
    return arm.settings.training.model_copy(update=update).warmup_length(total)


def best_point(arm: ArmPlan, study: optuna.Study) -> Point:
    """Return the point of an arm's best complete trial, or an empty one."""
    best = _best(arm, _complete(study))
    return {} if best is None else point_of(best)


def queue_refined(arm: ArmPlan, study: optuna.Study, points: Sequence[Point]) -> int:
    """Queue the points that are new, and return their number."""
    known = _refined_points(study)
    best = _best(arm, _complete(study))
    new = [point for point in points if point not in known]
    for point in new:
        assert best is not None, "points beside the best one need a best one"
        study.enqueue_trial(best.params, user_attrs={REFINES: point})
    return len(new)


def _refined_points(study: optuna.Study) -> list[Point]:
    trials = study.get_trials(deepcopy=False)
    return [trial.user_attrs[REFINES] for trial in trials if REFINES in trial.user_attrs]


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ran to their own end."""
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in found if STATES[trial.user_attrs["cause"]].complete]


def _best(arm: ArmPlan, trials: list[FrozenTrial]) -> FrozenTrial | None:
    order = arm.settings.objective.order
    return min(trials, key=lambda trial: (order(trial.values[0]), trial.number), default=None)
