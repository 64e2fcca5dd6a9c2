"""Keep the values that a stored study was started with where only their defaults have changed since.

The command of an earlier version then resumes its study instead of asking another question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import optuna
from optuna.storages import BaseStorage

from sweeper.config import compose, grammar
from sweeper.config.settings import (
    PrunerSettings,
    RunSettings,
    SamplerSettings,
    kept_defaults,
    validate,
)
from sweeper.config.space import Choice, Domain, Interval, Space, grid
from sweeper.search.study import METHODS, recipes_of, settings_as_json
from sweeper.search.study_plan import (
    BATCH,
    EPOCHS,
    ArmPlan,
    StudyPlan,
    shareable_batches,
    with_fair_budget,
)
from sweeper.search.warm_start import forked_study

EARLIER_RUNGS: Mapping[str, list[int]] = {
    "median": [350, 500, 650, 800],
    "percentile": [350, 500, 650, 800],
    "successive_halving": [340, 680],
}
"""Default rungs of earlier versions, by pruner."""
EARLIER_SPACES: Mapping[str, tuple[str, ...]] = {
    "adapter.alpha_over_r": ("choice(1, 2, 4)",),
    "training.learning_rate": ("choice(3e-06, 8.6e-06, 2.4e-05, 7e-05, 0.0002)",),
    # the default for few training rows, which the plan does not know yet
    EPOCHS: ("int(interval(1, 5))",),
}
"""Domains that were defaults when studies were stored, as these have them, by key."""
EARLIER_METHODS = {"sampler": "tpe", "pruner": "median"}
"""Defaults of the versions that did not store which sampler and pruner a study began with."""
Method = TypeVar("Method", SamplerSettings, PrunerSettings)
SEARCHED_SINCE = (EPOCHS, BATCH)
"""Keys that the defaults search now and earlier versions did not."""


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
        own = studies.get(arm.name)
        stored = own or forked_study(plan, arm, storage)
        kept = {} if stored is None else _kept(arm, stored)
        spaces = {} if own is None else kept_domains(arm, own.user_attrs.get("question", {}))
        arm = _with_values(arm, kept) if kept else arm
        arm = _with_space(arm, spaces) if spaces else arm
        arms.append(arm if own is None else _with_recipes(arm, own))
        if words := _in_words(kept, spaces):
            notes.append(f"arm {arm.name} keeps {words}, its defaults when it was started")
    plan = with_fair_budget(replace(plan, arms=tuple(arms)))
    plan, methods = _with_stored_methods(plan, studies)
    notes += methods
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


def _with_recipes(arm: ArmPlan, stored: optuna.Study) -> ArmPlan:
    """Return the arm with the recipes that its study began with. An earlier version had none."""
    found = recipes_of(stored)
    if found is None:
        return replace(arm, recipes=(), recipe_parts=())
    return replace(arm, recipes=found)


def kept_domains(arm: ArmPlan, question: Mapping[str, str]) -> dict[str, Domain | None]:
    """Return the domains that a stored study keeps because only their defaults have changed.

    Args:
        arm: the arm as today's defaults make it.
        question: the parts of the stored question, in which `space KEY` has the domain of a key.

    Returns:
        The domains by key. None stands for a key that the study does not search.
    """
    if not question:
        return {}
    today = _default_domains(arm)
    kept: dict[str, Domain | None] = {}
    for key, domain in arm.space.items():
        before = question.get(f"space {key}")
        # A domain of the user's own is another question, which is refused with the ways out
        if before == str(domain) or str(domain) not in today:
            continue
        if before is None and key in SEARCHED_SINCE:
            kept[key] = None
        elif before in EARLIER_SPACES.get(key, ()):
            found = grammar.parse_domain(key, before)
            assert isinstance(found, Choice | Interval), f"{key}={before} is a stored domain"
            kept[key] = found
    return kept


def _default_domains(arm: ArmPlan) -> set[str]:
    """Return the domains that the presets of the space offer, as stored studies have them."""
    space = arm.settings.space
    texts = (space.learning_rate, space.r, space.alpha_over_r, space.full_learning_rate)
    given = [*texts, *space.shared_params.values()]
    training = arm.settings.training
    size, devices = training.per_device_train_batch_size, training.devices_per_trial
    if isinstance(batches := space.shared_params.get(BATCH), str):
        given.append(shareable_batches(batches, size, devices))
    return {str(grammar.parse_domain("space", text)) for text in given}


def _with_space(arm: ArmPlan, kept: Mapping[str, Domain | None]) -> ArmPlan:
    """Return the arm with the kept domains, and with a grid where they make its space one."""
    both = {**arm.space, **kept}
    changed: Space = {key: domain for key, domain in both.items() if domain is not None}
    arm = replace(arm, space=changed)
    rates = kept.get("training.learning_rate")
    if not isinstance(rates, Choice) or set(changed) != {"training.learning_rate"}:
        return arm
    sampler = arm.sampler.model_copy(update={"name": "grid", "class_name": None, "kwargs": {}})
    count = min(arm.n_trials, sum(1 for _ in grid(changed)))
    return replace(arm, sampler=sampler, n_trials=count, priors=(), refine=True)


def _in_words(kept: Mapping[str, str], spaces: Mapping[str, Domain | None]) -> str:
    """Return what an arm keeps as text, or '' if nothing of it differs from today's defaults."""
    values = [f"{key}={text}" for key, text in kept.items()]
    domains = [
        f"{key} as it is" if domain is None else f"{key}={domain}" for key, domain in spaces.items()
    ]
    return ", ".join([*values, *domains])


def _with_stored_methods(
    plan: StudyPlan, studies: Mapping[str, optuna.Study]
) -> tuple[StudyPlan, list[str]]:
    """Return the plan with the samplers and the pruner that its study began with, and sentences.

    A method that the command names is the user's, and one that an experiment chooses is no default.
    """
    notes, arms = [], []
    for arm in plan.arms:
        kept = _stored_method(plan, arm, studies, "sampler", arm.sampler)
        if kept.name != arm.sampler.name:
            notes.append(f"arm {arm.name} keeps sampler={kept.name}, with which it was started")
            arm = replace(arm, sampler=kept.model_copy(update={"seed": arm.sampler.seed}))
        arms.append(arm)
    plan = replace(plan, arms=tuple(arms))
    today = plan.study.pruner
    pruner = _stored_method(plan, plan.arms[0], studies, "pruner", today)
    if pruner.name == today.name:
        return plan, notes
    pruner = pruner.model_copy(update={"audit_fraction": today.audit_fraction})
    notes.append(f"the study keeps pruner={pruner.name}, with which it was started")
    return replace(plan, study=plan.study.model_copy(update={"pruner": pruner})), notes


def _stored_method(
    plan: StudyPlan,
    arm: ArmPlan,
    studies: Mapping[str, optuna.Study],
    group: str,
    today: Method,
) -> Method:
    """Return the method that an arm's study began with, or today's where nothing says otherwise."""
    named = {key for each in plan.arms for key in named_keys(each)}
    given = named & {group, f"{group}.name", f"hydra.sweeper.{group}.name"}
    if arm.name not in studies or given or today.name != compose.compose(()).choices[group]:
        return today
    stored = studies[arm.name].user_attrs.get(METHODS, {}).get(group)
    if stored is None:
        stored = compose.compose((f"{group}={EARLIER_METHODS[group]}",)).sweeper[group]
    return validate(type(today), stored)


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
