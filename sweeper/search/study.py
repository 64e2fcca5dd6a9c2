"""The Optuna study of an arm: its storage, the question it answers, and its trials.

Only the driver uses this module, so every study has one writer. Optuna's heartbeat is not used,
because it does not work with ask and tell. On start every RUNNING trial is an orphan of a dead
driver and is reattached.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState
from pydantic import ValidationError

from sweeper.config.decisive_settings import decisive_settings
from sweeper.config.input_sources import named_by
from sweeper.config.settings import LoraAdapter, TrialSettings, changed_parts, stored_text
from sweeper.config.space import (
    Branches,
    Choice,
    Domain,
    Draw,
    Point,
    Scalar,
    Space,
    always_decided,
    grid,
    locate,
    walk,
)
from sweeper.core.errors import StudyError, StudyMismatch
from sweeper.core.input_digests import ASKED, INPUT_NAMES
from sweeper.core.outcome import ArmBaseline, Outcome
from sweeper.core.paths import StudyFolder
from sweeper.core.references import referenced_tree
from sweeper.core.stored_files import damage
from sweeper.search.known_points import STORED_RECIPES, KnownRecipe
from sweeper.search.ownership import database_url
from sweeper.search.pruning import make_pruner
from sweeper.search.record_prefix import (
    CONTINUES,
    TURN,
    TrialTurn,
    next_turn,
    prefix_of,
    turn_of,
)
from sweeper.search.samplers import SamplerContext, make_sampler
from sweeper.search.storage import PATIENCE_S, OpeningWait, PatientStorage
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.search.telling import counts

DTYPE = "computed dtype"
TARGETS = "adapter.target_modules"
TARGET_TOKENS = "target tokens of the validation split"
"""Stands for the digest of the judged rows in questions that earlier versions stored."""
_ASKED = {INPUT_NAMES[name]: name for name in ASKED}
MEASURED = (*_ASKED, DTYPE, TARGET_TOKENS)
"""Parts of a question that are known once a worker has loaded the data and the model."""
FORMAT = 1
"""Version of an arm's study in Optuna's storage: its attributes, and those of its trials. It rises only
when an older program would misread them; a setting that is added is a line of ADDED_SETTINGS instead."""
UUID = "uuid"
"""User attribute of each arm's study: the UUID of the study, which its folder holds as well."""
UUID_PATTERN = r"[A-Za-z0-9_-]+"
"""Form of a UUID, whose beginning is the name of a folder."""
QUEUED_BY = "queued_by"
"""User attribute of a trial that a command queued: the command's id."""
CLONE_OF = "clone_of"
"""User attribute of a trial that was queued as a changed copy: the earlier trial's number."""
MARGIN = "equivalence_margin"
"""User attribute of an arm's study: the margin of equivalence that was fixed before its first trial."""
ORDERED = "ordered_choices"
"""User attribute of an arm's study: True if its samplers see choices between numbers in their order."""
RECIPES = "recipes"
"""User attribute of an arm's study: the recipes that were fixed before its first trial."""
METHODS = "methods"
"""User attribute of an arm's study: the sampler and the pruner that its first trial was chosen by."""
REFINES = "refines"
"""User attribute of a trial beside a grid: the values that replace or join those of its draw."""
WORKERS = "workers"
"""User attribute of each arm's study: the devices and the CPU threads that the study uses."""
AUDITED = "audited"
"""User attribute of a trial that the pruner would have stopped, and that was kept running."""
HOPELESS_AT = "hopeless_at"
"""User attribute of a trial that the pruner stops: the step of the evaluation that decided it."""
DROPPED = "dropped"
"""User attribute of a trial that a user stopped for good."""


def open_storage(
    url: str | None,
    folder: StudyFolder,
    seconds_over: Callable[[], float] = lambda: -math.inf,
    check: Callable[[], object] = lambda: None,
) -> PatientStorage:
    """Open Optuna's storage: the given URL, or SQLite in the study's folder.

    Args:
        url: the database that the settings name, if any.
        folder: the study's folder.
        seconds_over: returns the seconds since the end of the study's time, negative before.
        check: called before each attempt at a database that is away. Its error ends the wait.
    """
    if url is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        url = database_url(folder.database)
        return PatientStorage(url)
    # a study that was run before is waited for as it is while it runs; a first start may be misspelt
    patience_s = PATIENCE_S if folder.standing.exists() else 0.0
    return PatientStorage(url, OpeningWait(patience_s, seconds_over, check))


def share_cache(storage: RDBStorage) -> BaseStorage:
    """Return a storage that reads each finished trial once, however many studies are opened on it.

    create_study and load_study put an empty cache of their own in front of a bare RDBStorage.
    """
    # with a cache of its own, each report read all trials again:
    # 1.2 of 1.6 CPU seconds a trial after 1,000
    return get_storage(storage)


def optuna_name(study_name: str, arm: str) -> str:
    """Return the name of an arm's study in Optuna's storage."""
    return f"{study_name}/{arm}"


def open_study(
    plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline, storage: BaseStorage, uuid: str
) -> optuna.Study:
    """Create or resume the Optuna study of an arm.

    Args:
        plan: the study.
        arm: its arm.
        facts: the facts about the arm.
        storage: the study's storage.
        uuid: the study's UUID, stored unless an earlier run has stored one.

    Raises:
        StudyMismatch: the study of this name has other spaces, settings, data or base model.
        StudyError: a newer version stored it.
    """
    # what is traded for the objective's value is a cost, so less of it is always better
    costs: list[Literal["minimize", "maximize"]] = ["minimize"] * len(plan.study.costs)
    study = optuna.create_study(
        storage=storage,
        study_name=optuna_name(plan.study.study_name, arm.name),
        directions=[plan.objective.direction, *costs],
        pruner=make_pruner(plan.study.pruner),
        load_if_exists=True,
    )
    require_readable(study)
    _check_question(study, plan, arm, facts)
    _fix_order(study)
    context = sampler_context(plan, arm, ordered=study.user_attrs[ORDERED])
    study.sampler = make_sampler(arm.sampler, arm.space, arm.n_trials, context)
    _fix_recipes(study, arm)
    _fix_methods(study, plan, arm)
    study.set_user_attr("facts", facts.model_dump(mode="json"))
    # last: find_study ignores a study without facts, and the next start would choose another UUID
    if study_uuid(study) is None:
        study.set_user_attr(UUID, uuid)
    _fix_margin(study, plan)
    return study


def sampler_context(plan: StudyPlan, arm: ArmPlan, ordered: bool = True) -> SamplerContext:
    """Return the properties of an arm that its sampler goes by."""
    adapter, objective = arm.settings.adapter, plan.objective
    return SamplerContext(
        adapter=adapter if isinstance(adapter, LoraAdapter) else None,
        objectives=1 + len(plan.study.costs),
        looks_are_values=objective.judged_while_training == objective.metric,
        ordered=ordered,
    )


def _fix_order(study: optuna.Study) -> None:
    """Store before the first trial that choices are ordered. A study that has trials keeps its draws."""
    if ORDERED not in study.user_attrs:
        study.set_user_attr(ORDERED, not study.get_trials(deepcopy=False))


def _fix_margin(study: optuna.Study, plan: StudyPlan) -> None:
    """Store the margin of equivalence before the first trial, and never change it afterwards."""
    if MARGIN in study.user_attrs:
        return
    margin = plan.study.verdict.equivalence_margin
    # A margin that is chosen when values are known proves nothing: a study of an older version has none.
    fixed = margin is not None and not study.get_trials(deepcopy=False)
    study.set_user_attr(MARGIN, margin.model_dump() if margin is not None and fixed else None)


def _fix_recipes(study: optuna.Study, arm: ArmPlan) -> None:
    """Store the recipes of an arm before its first trial, and never change them afterwards."""
    # A recipe that is added to a running search would be compared with a winner it did not precede
    if RECIPES not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(RECIPES, STORED_RECIPES.dump_python(arm.recipes, mode="json"))


def _fix_methods(study: optuna.Study, plan: StudyPlan, arm: ArmPlan) -> None:
    """Store before the first trial which sampler and pruner an arm has, so that both can be kept."""
    if METHODS not in study.user_attrs and not study.get_trials(deepcopy=False):
        found = {"sampler": arm.sampler, "pruner": plan.study.pruner}
        stored = {name: settings.model_dump(mode="json") for name, settings in found.items()}
        study.set_user_attr(METHODS, stored)


def recipes_of(study: optuna.Study) -> tuple[KnownRecipe, ...] | None:
    """Return the recipes that an arm's study began with, or None if an older version opened it.

    Raises:
        StudyError: they are damaged.
    """
    if RECIPES not in study.user_attrs:
        return None
    try:
        return STORED_RECIPES.validate_python(study.user_attrs[RECIPES])
    except ValidationError as error:
        raise _damaged(study, f"{RECIPES}: {damage(error)}") from None


def study_uuid(study: optuna.Study) -> str | None:
    """Return the UUID of the study that an arm belongs to, or None if an older version stored it."""
    # in the storage, so that a copied or moved database keeps its folder
    uuid: str | None = study.user_attrs.get(UUID)
    return uuid


def require_readable(study: optuna.Study) -> None:
    """Refuse a study that a newer version stored, or whose attributes are damaged.

    Raises:
        StudyError: names both formats, or the damaged attribute, and how the answer is kept.
    """
    found = study.user_attrs.get("format", 1)  # the first format had no number
    if found > FORMAT:
        name = study.study_name.partition("/")[0]
        raise StudyError(
            f"study {name!r} is of format {found}, this version reads up to format {FORMAT}: continue "
            "it with the version that stored it, or start a new study: "
            f"hydra.sweeper.study_name={name}_2"
        )
    uuid = study_uuid(study)
    if uuid is not None and not re.fullmatch(UUID_PATTERN, str(uuid)):
        raise _damaged(study, f"{UUID}: {uuid!r} is no UUID")
    if "facts" in study.user_attrs:
        try:
            ArmBaseline.model_validate(study.user_attrs["facts"])
        except ValidationError as error:
            raise _damaged(study, f"facts: {damage(error)}") from None
    recipes_of(study)
    outcomes_in(study)


def outcomes_in(study: optuna.Study) -> dict[int, Outcome]:
    """Return the stored outcomes of an arm's finished trials, by number.

    Raises:
        StudyError: one of them is damaged.
    """
    found: dict[int, Outcome] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and "outcome" in trial.user_attrs:
            try:
                found[trial.number] = Outcome.model_validate(trial.user_attrs["outcome"])
            except ValidationError as error:
                raise _damaged(study, f"trial {trial.number}: {damage(error)}") from None
    return found


def _damaged(study: optuna.Study, what: str) -> StudyError:
    name = study.study_name.partition("/")[0]
    return StudyError(
        f"study {study.study_name!r} is damaged in its database ({what}). Put a copy of the database "
        f"back, or start a new study: hydra.sweeper.study_name={name}_2"
    )


def enqueue(study: optuna.Study, draws: list[Draw]) -> int:
    """Enqueue draws that are neither tried nor queued yet.

    Returns:
        The number of draws that were new.
    """
    taken = [draw_of(trial) for trial in study.get_trials(deepcopy=False) if is_taken(trial)]
    new = 0
    for draw in draws:
        if not any(draw.items() <= other.items() for other in taken):
            study.enqueue_trial(draw)
            taken.append(draw)
            new += 1
    return new


def ask(study: optuna.Study, places: int = 1) -> Trial:
    """Ask for the next trial: an interrupted one first, then the queue, then the sampler.

    Args:
        study: the arm's study.
        places: see `reach` of record_prefix.

    Returns:
        A trial whose study shows what decisions about it read.
    """
    trials, storage = study.get_trials(deepcopy=False), study._storage
    first = next_queued(trials)
    if first is None:
        trial_id = storage.create_new_trial(study._study_id)
    else:
        trial_id = first._trial_id
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    return _take_turn(study, trial_id, _turn_for(first, trials, places))


def next_queued(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the queued trial that comes first, or None if none is queued."""
    # study.ask() would take the oldest, but a prior is older than an interrupted trial, whose place
    # precedes it, and than a user's request
    waiting = [trial for trial in trials if trial.state is TrialState.WAITING]
    return min(
        waiting,
        key=lambda trial: (
            CONTINUES not in trial.user_attrs,
            QUEUED_BY not in trial.user_attrs,
            trial.number,
        ),
        default=None,
    )


def _turn_for(queued: FrozenTrial | None, trials: Sequence[FrozenTrial], places: int) -> TrialTurn:
    number = None if queued is None else queued.user_attrs.get(CONTINUES)
    if number is None:
        return next_turn(trials, places)
    return turn_of(next(trial for trial in trials if trial.number == number))


def _take_turn(study: optuna.Study, trial_id: int, turn: TrialTurn) -> Trial:
    # before the trial can draw, so that a killed driver's successor draws the same
    study._storage.set_trial_user_attr(trial_id, TURN, [turn.place, turn.reads])
    return Trial(prefix_of(study, turn), trial_id)


def steering_tags(trial: BaseTrial) -> dict[str, str]:
    """Return the MLflow tags of a trial that a user queued."""
    if QUEUED_BY not in trial.user_attrs:
        return {}
    number = trial.user_attrs.get(CLONE_OF)
    return {"steering": "enqueued" if number is None else f"clone of {number}"}


def ask_again(study: optuna.Study, trial: Trial, space: Space) -> None:
    """Enqueue a cancelled trial's point again, to be continued from its checkpoint."""
    suggest(trial, space)
    # an audit that is drawn again would prune trials that the first draw had spared, and a hopeless one
    # that was killed before it stopped has no further decision
    decided = (AUDITED, HOPELESS_AT, REFINES)
    kept = {key: trial.user_attrs[key] for key in decided if trial.user_attrs.get(key)}
    attributes = {CONTINUES: trial.number, **kept}
    study.enqueue_trial(trial.params, user_attrs=attributes)


def find_study(plan: StudyPlan, arm: ArmPlan, storage: BaseStorage) -> optuna.Study | None:
    """Return an arm's study, or None if it was never opened."""
    name = optuna_name(plan.study.study_name, arm.name)
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    # A driver killed between creating the study and describing it leaves a name without content.
    require_readable(study)
    return study if "facts" in study.user_attrs else None


def is_taken(trial: FrozenTrial) -> bool:
    """Return True if a trial's point must not be proposed again."""
    # A failed trial may be proposed again unless it trained a step or a user dropped it.
    return trial.state is not TrialState.FAIL or counts(trial) or DROPPED in trial.user_attrs


def draw_of(trial: FrozenTrial) -> Draw:
    """Return the parameters that were drawn, or those fixed for a trial that is still queued."""
    fixed: Draw = trial.system_attrs.get("fixed_params", {})
    return {**fixed, **trial.params}


def first_draws(arm: ArmPlan) -> list[Draw]:
    """Return the draws before the sampler's: the whole grid, or the recipes and then the priors."""
    if arm.sampler.name == "grid":
        return list(itertools.islice(grid(arm.space), arm.n_trials))
    points = (*(recipe.point for recipe in arm.recipes), *arm.recipe_parts, *arm.priors)
    return [draw for point in points if (draw := locate(arm.space, point))]


def suggest(trial: BaseTrial, space: Space) -> Point:
    """Draw a point. Values that a killed driver had drawn are returned unchanged."""
    drawn = walk(space, lambda name, domain: _suggest(trial, name, domain))
    return {**drawn, **trial.user_attrs.get(REFINES, {})}


def _suggest(trial: BaseTrial, name: str, domain: Domain) -> Scalar:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, domain.values)
    if domain.integer:
        # Optuna refuses step=None for integers.
        step = int(domain.step or 1)
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log, step=step)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step)


def point_of(trial: FrozenTrial) -> Point:
    """Return the values of the searched settings that a trial tried."""
    # Parameters inside branches carry the branch in their names. The point has the settings' own.
    point: Point = trial.user_attrs.get("point", trial.params)
    return point


def shown_point(trial: FrozenTrial) -> Point:
    """Return the point with the rank that followed from adapter.trainable_parameters."""
    rank = decided_rank(trial)
    return {**point_of(trial), **({} if rank is None else {"adapter.r": rank})}


def settings_of(arm: ArmPlan, trial: FrozenTrial) -> TrialSettings:
    """Return the settings that a trial was trained with."""
    settings: TrialSettings = arm.settings_at(point_of(trial)).trial
    return settings.with_rank(decided_rank(trial))


def decided_rank(trial: BaseTrial) -> int | None:
    """Return the rank that followed from adapter.trainable_parameters, or None if it is not known."""
    sized: dict[str, int] = trial.user_attrs.get("sized", {})
    return sized.get("rank")


def reattach_orphans(study: optuna.Study, places: int = 1) -> list[Trial]:
    """Return the trials that a dead driver left RUNNING as trials that can be told."""
    # Trial(study, id) is the only way to tell a trial that another process asked for. Optuna
    # advises against it, so the version is pinned and the cases are tested.
    found: list[Trial] = []
    for orphan in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if TURN in orphan.user_attrs:
            found.append(Trial(prefix_of(study, turn_of(orphan)), orphan._trial_id))
            continue
        # killed before its turn was stored, or asked by an earlier version
        trials = study.get_trials(deepcopy=False)
        others = [trial for trial in trials if trial.number != orphan.number]
        found.append(_take_turn(study, orphan._trial_id, _turn_for(orphan, others, places)))
    return found


def counted(study: optuna.Study) -> int:
    """Count the trials that use up n_trials."""
    return sum(map(counts, study.get_trials(deepcopy=False)))


def find_duplicate(
    study: optuna.Study, point: Point, equal: Mapping[str, str] | None = None
) -> FrozenTrial | None:
    """Return a trial of a study at this point that has a result or was pruned, if any.

    Args:
        study: the study of the arm.
        point: the point.
        equal: presets of target modules that adapt the same weights as another one, with its name.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    wanted = _merged(point, equal or {})
    return next((other for other in done if _merged(point_of(other), equal or {}) == wanted), None)


def _merged(point: Point, equal: Mapping[str, str]) -> Point:
    """Return a point with one name for each set of adapted weights."""
    chosen = point.get(TARGETS)
    return (
        {**point, TARGETS: equal[chosen]} if isinstance(chosen, str) and chosen in equal else point
    )


def describe_equal_choices(space: Space, equal: Mapping[str, str]) -> list[str]:
    """Return a sentence for each choice of a space that adapts the same weights as another one."""
    domain = space.get(TARGETS)
    choice = domain.choice if isinstance(domain, Branches) else domain
    values = choice.values if isinstance(choice, Choice) else ()
    merged: dict[str, list[str]] = {}
    for value in values:
        merged.setdefault(equal.get(str(value), str(value)), []).append(str(value))
    return [
        f"{TARGETS}: {' and '.join(same)} are the same modules of this base, so only one of two "
        "points that differ in nothing else is trained"
        for same in merged.values()
        if len(same) > 1
    ]


def question(plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline) -> dict[str, str]:
    """Return the question that an arm's study answers, part by part.

    The number of trials, the sampler and package versions are not part of the question.
    """
    found = facts.inputs.model_dump()
    digests = {part: found[name] for part, name in _ASKED.items() if found[name] is not None}
    return {**digests, DTYPE: facts.dtype, **_configured_question(plan, arm)}


def completed_questions(
    study: optuna.Study, asked: dict[str, str], facts: ArmBaseline
) -> tuple[dict[str, str], dict[str, str]]:
    """Return a stored question and today's with the parts that earlier versions did not store.

    Those versions stored the facts of their runs. What these do not tell is taken to be as it is today.
    """
    before: dict[str, str] = study.user_attrs["question"]
    then: Mapping[str, Any] = study.user_attrs.get("facts", {})
    known = {DTYPE: then.get("dtype", facts.dtype)}
    added = {part: known.get(part, asked[part]) for part in MEASURED if part in asked}
    tokens = then.get("target_tokens", facts.target_tokens)
    # The same texts under another template or tokenizer have other target tokens
    if INPUT_NAMES["judged"] not in before and tokens != facts.target_tokens:
        added[TARGET_TOKENS] = str(tokens)
        asked = {**asked, TARGET_TOKENS: str(facts.target_tokens)}
    return {**added, **before}, asked


def require_same_settings(study: optuna.Study, plan: StudyPlan, arm: ArmPlan) -> None:
    """Refuse a stored study of another question, as far as that shows before the model is loaded.

    Raises:
        StudyMismatch: the study of this name has other spaces or settings.
    """
    before: dict[str, str] = study.user_attrs.get("question", {})
    known = {key: text for key, text in before.items() if key not in MEASURED}
    if known:
        _refuse_changes(known, _configured_question(plan, arm), plan, arm)


def _configured_question(plan: StudyPlan, arm: ArmPlan) -> dict[str, str]:
    """Return the parts of the question that follow from the configuration alone."""
    # The value under a searched key is overwritten by every trial, so it is no part of the
    # question.
    decided = always_decided(arm.space)
    return {
        "costs": ", ".join(plan.study.costs) or "none",
        **({} if arm.run_id is None else {"adopted run": arm.run_id}),
        **{f"space {key}": str(domain) for key, domain in arm.space.items()},
        **{key: text for key, text in settings_as_json(arm).items() if key not in decided},
    }


def settings_as_json(arm: ArmPlan) -> dict[str, str]:
    """Return an arm's settings before any point is applied, without those that change no result."""
    found: dict[str, str] = referenced_tree(decisive_settings(arm.settings.trial))
    return found


def _check_question(study: optuna.Study, plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline) -> None:
    asked = question(plan, arm, facts)
    if "question" not in study.user_attrs:
        study.set_user_attr("format", FORMAT)
        study.set_user_attr("question", asked)
        return
    before, now = completed_questions(study, asked, facts)
    _refuse_changes(before, now, plan, arm)
    if before != study.user_attrs["question"]:
        # from now on, the parts that an earlier version did not store are part of the question
        study.set_user_attr("question", before)


def _files_of(part: str, arm: ArmPlan) -> str:
    """Return the settings in brackets that name the files behind a measured part."""
    name = "judged" if part == TARGET_TOKENS else _ASKED.get(part)
    return "" if name is None else named_by((name,), arm.settings.trial)


def _refuse_changes(
    before: dict[str, str], asked: dict[str, str], plan: StudyPlan, arm: ArmPlan
) -> None:
    if changed := changed_parts(before, asked):
        name = plan.study.study_name
        page = StudyFolder(Path(plan.settings.output_dir) / name).page
        lines = [
            f"    {key}: {stored_text(before, key) or 'absent'} then, {asked.get(key, 'absent')} now"
            f"{_files_of(key, arm)}"
            for key in changed
        ]
        raise StudyMismatch(
            f"study {name!r} (arm {arm.name}) was started with another question:\n"
            + "\n".join(lines)
            + "\n  ways out:\n"
            f"    start a new study:      hydra.sweeper.study_name={name}_2\n"
            "    keep what still fits:   "
            f"hydra.sweeper.study_name={name}_2 hydra.sweeper.fork_of={name}\n"
            "    continue the old one:   give the values it was started with"
            + (f"\n    read its answer:        {page}" if page.exists() else "")
        )
