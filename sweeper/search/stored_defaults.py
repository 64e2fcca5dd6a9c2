"""Keep the values that a stored study was started with where only their defaults have changed since.

The command of an earlier version then resumes its study instead of asking another question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import optuna
from optuna.storages import BaseStorage

from sweeper.config import compose
from sweeper.config.settings import PrunerSettings, RunSettings, kept_defaults, validate
from sweeper.search.study import settings_as_json
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.search.warm_start import forked_study

EARLIER_RUNGS: Mapping[str, list[int]] = {
    "median": [350, 500, 650, 800],
    "percentile": [350, 500, 650, 800],
    "successive_halving": [340, 680],
}
"""Default rungs of earlier versions, by pruner."""


def with_stored_defaults(
    plan: StudyPlan, studies: Mapping[str, optuna.Study], storage: BaseStorage
) -> tuple[StudyPlan, list[str]]:
    """Return a plan with the values that its stored study, or the study that it forks, keeps.

    Args:
        plan: the plan as today's defaults make it.
        studies: the stored studies of its arms, by name.
        storage: the study's storage.

    Returns:
        The plan, and a sentence for each arm that keeps a value and for the pruner.
    """
    arms, notes = [], []
    for arm in plan.arms:
        stored = studies.get(arm.name) or forked_study(plan, arm, storage)
        kept = {} if stored is None else _kept(arm, stored)
        arms.append(_with_values(arm, kept) if kept else arm)
        if kept:
            notes.append(
                f"arm {arm.name} keeps {_in_words(kept)}, its defaults when it was started"
            )
    plan = replace(plan, arms=tuple(arms))
    pruner = _stored_pruner(plan, studies)
    if pruner != plan.study.pruner:
        plan = replace(plan, study=plan.study.model_copy(update={"pruner": pruner}))
        notes.append(f"the pruner keeps rungs={pruner.rungs}, which its trials were compared at")
    return plan, notes


def named_keys(arm: ArmPlan) -> set[str]:
    """Return the keys of the settings that the overrides of an arm name."""
    return {compose.key_of(text) for text in arm.overrides}


def _kept(arm: ArmPlan, stored: optuna.Study) -> dict[str, str]:
    question = stored.user_attrs.get("question", {})
    return kept_defaults(question, settings_as_json(arm), named_keys(arm) | {*arm.space})


def _with_values(arm: ArmPlan, kept: Mapping[str, str]) -> ArmPlan:
    overrides = (*arm.overrides, *(f"{key}={text}" for key, text in kept.items()))
    settings = validate(RunSettings, compose.compose(overrides).config)
    return replace(arm, overrides=overrides, settings=settings)


def _in_words(kept: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={text}" for key, text in kept.items())


def _stored_pruner(plan: StudyPlan, studies: Mapping[str, optuna.Study]) -> PrunerSettings:
    """Return the pruner, with the rungs of earlier defaults if trials were compared at those."""
    pruner = plan.study.pruner
    earlier = EARLIER_RUNGS.get(pruner.name)
    named = {key for arm in plan.arms for key in named_keys(arm)}
    if earlier is None or "hydra.sweeper.pruner.rungs" in named:
        return pruner
    # The pruner is no part of the question, so the rungs are read from the trials that passed them
    passed = {
        step
        for study in studies.values()
        for trial in study.get_trials(deepcopy=False)
        for step in trial.intermediate_values
    }
    if earlier[0] not in passed:
        return pruner
    return pruner.model_copy(update={"rungs": earlier})
