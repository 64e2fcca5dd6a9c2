"""Fill an arm's study with the points to try before its sampler chooses."""

from __future__ import annotations

import optuna
from optuna.storages import BaseStorage

from sweeper.config.settings import PrunerSettings
from sweeper.core.outcome import ArmBaseline
from sweeper.search.samplers import outside_geometry
from sweeper.search.study import enqueue, first_draws
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.search.warm_start import fork, winners


def fill_study(
    study: optuna.Study, plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline, storage: BaseStorage
) -> list[str]:
    """Copy the trials of a fork, and enqueue the first points: winners, recipes, and then priors.

    Returns:
        Messages about this search for the user, one line each.

    Raises:
        StudyMismatch: the study to be forked does not exist, or does not compare with this one.
    """
    words = fork(study, plan, arm, facts, storage)
    # a grid tries all of its points, in its own order
    if plan.study.warm_start and arm.sampler.name != "grid":
        draws, said = winners(plan, arm, facts, storage)
        enqueue(study, draws)
        words += said
    points = enqueue(study, first_draws(arm))
    if points and arm.sampler.name != "grid":
        names = ", ".join(recipe.name for recipe in arm.recipes)
        words.append(f"{points} known-good points first" + (f" ({names})" if names else ""))
    return [
        *words,
        *_about_sampling(arm, plan.study.costs),
        *_about_pruning(plan.study.pruner, plan.study.costs),
    ]


def _about_sampling(arm: ArmPlan, costs: list[str]) -> list[str]:
    reason = outside_geometry(arm.space, 1 + len(costs))
    if arm.sampler.name != "lora" or reason is None:
        return []
    return [f"sampler tpe chooses the points: {reason}, which sampler lora does not model"]


def _about_pruning(pruner: PrunerSettings, costs: list[str]) -> list[str]:
    if costs and pruner.name != "none":
        return [f"nothing is pruned: costs={costs} make this a search of several objectives"]
    if pruner.name == "optuna":
        return [f"pruner {pruner.class_name}: unguarded, asked at every evaluation"]
    return []
