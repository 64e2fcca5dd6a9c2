"""The trial of an arm's best recipe, with which the winner of the search is compared."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.space import Draw, locate
from sweeper.search.known_points import KnownRecipe
from sweeper.search.states import STATES
from sweeper.search.study import REFINES
from sweeper.search.study_plan import ArmPlan


def best_recipe(arm: ArmPlan, study: optuna.Study) -> tuple[KnownRecipe, FrozenTrial] | None:
    """Return the known point with the best value of an arm and its trial, or None.

    Known points that were pruned or are infeasible have no value of their own.
    """
    order = arm.settings.objective.order
    draws = [(recipe, locate(arm.space, recipe.point)) for recipe in arm.recipes]
    found = [
        (recipe, trial)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if STATES[trial.user_attrs["cause"]].complete and REFINES not in trial.user_attrs
        for recipe, draw in draws
        if _tried(trial, draw)
    ]
    return min(found, key=lambda each: (order(each[1].values[0]), each[1].number), default=None)


def _tried(trial: FrozenTrial, draw: Draw | None) -> bool:
    return draw is not None and draw.items() <= trial.params.items()
