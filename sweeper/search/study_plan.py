"""The validated plan of a study: its arms, their search spaces, and the settings of any point.

Every mistake that can be found without loading a model is reported here, all at once.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sweeper.config import compose, grammar
from sweeper.config.foreign_settings import differing_places
from sweeper.config.override_hints import moved
from sweeper.config.settings import (
    ArmSettings,
    Objective,
    RecipeSettings,
    RunSettings,
    SamplerSettings,
    StudySettings,
    describe,
    flatten,
    validate,
)
from sweeper.config.space import Choice, Point, Scalar, Space, decided_twice, grid, keys, probes
from sweeper.core.errors import ConfigError
from sweeper.core.regular_files import irregular_in
from sweeper.data.sources import not_made, path_problems
from sweeper.search.known_points import KnownRecipe, known_points
from sweeper.search.paper_protocol import under_protocol, with_protocol
from sweeper.search.pruning import make_pruner
from sweeper.search.samplers import make_sampler
from sweeper.search.study_naming import StudyNaming, name_study

LORA = "lora"
"""Name of the arm that `hydra.sweeper.params` describes."""
FULL = "full"
"""Name of the arm that an earlier run can replace (baseline.run_id)."""
FULL_OVERRIDES = ("adapter=none", "quantization=none")
"""Overrides of the full arm where the experiment gives none."""


EPOCHS = "training.num_train_epochs"
BATCH = "training.gradient_accumulation_steps"
PER_TOKEN = ("eval/loss", "eval/perplexity")
"""Metrics that depend on the tokenizer, so their values do not compare across base models."""
_OTHER_QUESTION = "decides what is compared, so it cannot be searched. Make it an arm or a study"
_MACHINERY = "is machinery and changes no result, so it cannot be searched"
NEVER_SEARCHED = {
    **dict.fromkeys(
        ("seed", "seed_init", "seed_data"),
        "is never searched: the best seed is luck. Repeat the best trials over seeds instead",
    ),
    **dict.fromkeys(("data", "evaluation", "objective"), _OTHER_QUESTION),
    **dict.fromkeys(
        ("space", "sampler", "pruner", "workers", "tracking", "output_dir", "dry_run"), _MACHINERY
    ),
}


@dataclass(frozen=True)
class ArmPlan:
    """One arm of a study: a variant of the experiment with a search space and an Optuna study of its
    own.
    """

    name: str
    overrides: tuple[str, ...]
    space: Space
    priors: tuple[Point, ...]
    n_trials: int
    sampler: SamplerSettings
    settings: RunSettings
    """Settings of the arm before any point of the space is applied."""
    run_id: str | None = None
    """The MLflow run whose model is judged instead of trainings."""
    refine: bool = False
    """True if points beside the best one of the arm's grid are tried as well."""
    recipes: tuple[KnownRecipe, ...] = ()
    """Named known points, which are tried before all others and compared with the winner."""
    recipe_parts: tuple[Point, ...] = ()
    """Points of the recipes that the arm cannot try as they are, as far as it offers their values."""

    def overrides_at(self, point: Mapping[str, Scalar]) -> list[str]:
        """Return the arm's overrides followed by those of a point."""
        return [*self.overrides, *_as_overrides(point)]

    def settings_at(self, point: Mapping[str, Scalar]) -> RunSettings:
        """Return the full settings of the trial at a point.

        Raises:
            ConfigError: the point is impossible (say, a target that the group does not have).
        """
        # Groups are composed again. Plain values are set on the composed config, which is 25 times
        # faster.
        groups = {key: value for key, value in point.items() if "." not in key}
        values = {key: value for key, value in point.items() if "." in key}
        composition = compose.compose((*self.overrides, *_as_overrides(groups)))
        return validate(RunSettings, compose.with_values(composition.unresolved, values))


def _as_overrides(point: Mapping[str, Scalar]) -> list[str]:
    return [grammar.format_override(key, value) for key, value in point.items()]


@dataclass(frozen=True)
class JudgedModels:
    """Numbers of models that are judged on unseen texts."""

    test: int
    """Models on the test split, if there is one."""
    general: int
    """Models on general text."""


@dataclass(frozen=True)
class StudyPlan:
    """A validated study: the question, and everything needed to answer it."""

    experiment: str
    study: StudySettings
    arms: tuple[ArmPlan, ...]
    presets: Mapping[str, str]
    """The presets that were chosen for groups set to `auto`, by group."""
    command: str
    """The user's arguments after `python -m sweeper`, for reports and error messages."""
    name_note: str = ""
    """Sentence about a study_name that the command line does not give, or ""."""

    @property
    def settings(self) -> RunSettings:
        """Settings that all arms share (output_dir, workers, tracking)."""
        return self.arms[0].settings

    @property
    def objective(self) -> Objective:
        """The objective of every arm's trials."""
        return self.settings.objective

    def further_seeds(self, arm: ArmPlan) -> int:
        """Count the trainings with further seeds that follow an arm's search."""
        if arm.run_id is not None:
            return 0
        wanted = self.study.finalists
        return wanted.top * (wanted.seeds - 1) + (wanted.fresh_seeds if wanted.top else 0)

    def recipe_seeds_at_most(self, arm: ArmPlan) -> int:
        """Count the trainings of an arm's recipe, which follow unless the recipe itself wins."""
        wanted = self.study.finalists
        compared = bool(arm.recipes) and arm.run_id is None and wanted.top > 0 and wanted.test
        return wanted.fresh_seeds if compared else 0

    def refined_at_most(self, arm: ArmPlan) -> int:
        """Return how many trials may follow beside the best one of an arm's grid."""
        rates = arm.space.get("training.learning_rate")
        whole = isinstance(rates, Choice) and arm.n_trials >= len(rates.values)
        # two rates beside the best one, and then the best with the warm-up of the LoRA winner
        return 3 if arm.refine and whole and arm.run_id is None else 0

    def judged_at_most(self, arm: ArmPlan) -> JudgedModels:
        """Count the models of an arm that are judged on unseen texts when all searches have ended."""
        wanted, trial = self.study.finalists, arm.settings.trial
        if wanted.top == 0:
            return JudgedModels(test=0, general=0)
        fresh = 0 if arm.run_id is not None else wanted.fresh_seeds
        own_seeds = 1 if arm.run_id is not None else wanted.seeds
        # without fresh seeds, the winner's own model is judged as one of the seeds that chose it
        forms = [form for form in trial.serve_forms if fresh or form != trial.evaluation.serve_as]
        # the untuned base is judged once, for the winner and its recipe
        seeds = 1 + (fresh or own_seeds)
        tested = seeds + len(forms) + self.recipe_seeds_at_most(arm)
        general = trial.evaluation.general_text.source is not None
        return JudgedModels(test=tested if wanted.test else 0, general=seeds if general else 0)

    @property
    def searches_epochs(self) -> bool:
        """True if the trials of an arm differ in their number of epochs."""
        return any(EPOCHS in arm.space for arm in self.arms)

    @property
    def equal_tokens(self) -> bool:
        """True if arms get equal tokens because the length of a trial is searched."""
        several = len(self.arms) > 1
        return self.study.fairness.equal == "tokens" and self.searches_epochs and several

    @property
    def dry_run(self) -> bool:
        """True if the study is only to be shown."""
        return self.settings.dry_run


def single(overrides: Sequence[str]) -> RunSettings:
    """Return the validated settings of a single trial.

    Raises:
        ConfigError: names everything that is wrong.
    """
    overrides = compose.with_auto_groups(overrides)
    composition, problems = compose.compose_leniently(overrides)
    problems += _setting_problems(composition.config)
    if problems:
        raise ConfigError(problems)
    return validate(RunSettings, composition.config)


def studies(overrides: Sequence[str]) -> list[StudyPlan]:
    """Return one plan for each experiment named on the command line.

    Raises:
        ConfigError: names everything that is wrong in any of them.
    """
    plans: list[StudyPlan] = []
    problems: list[str] = []
    # All experiments are validated before the first of them trains.
    for texts in compose.expand_experiments(overrides):
        try:
            plans.append(_plan(compose.with_auto_groups(texts)))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    names = [plan.study.study_name for plan in plans]
    if len(set(names)) < len(names):
        problems.append(
            f"hydra.sweeper.study_name={names[0]}: several experiments need a name each"
        )
    if problems:
        raise ConfigError(problems)
    return plans


def _plan(overrides: Sequence[str]) -> StudyPlan:
    fixed, swept = compose.split_sweeps(overrides)
    composition, problems = compose.compose_leniently(fixed)
    problems += _setting_problems(composition.config)
    problems += _unknown_keys(swept, composition)
    problems += _given_twice(fixed, swept)
    own = str(composition.sweeper["study_name"])
    naming = StudyNaming(own) if problems else name_study(fixed, composition)
    try:
        named = {**composition.sweeper, "study_name": naming.name}
        study = validate(StudySettings, named, "hydra.sweeper")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    problems += _library_problems(study)
    problems += _untracked_baseline(study, composition.config)
    problems += _gap_without_unit(study, composition.config)
    if problems:
        raise ConfigError(problems)
    study = under_protocol(study)
    arms = _arms(study, with_protocol(study, fixed), swept, composition)
    experiment = composition.choices.get("experiment", "default")
    presets = {
        # an `auto` that is left belongs to the embedded base, for which it means tiny
        group: composition.choices[group].replace("auto", "tiny")
        for group in compose.AUTO_GROUPS
    }
    command = _command([*overrides, *naming.overrides])
    return with_fair_budget(StudyPlan(experiment, study, arms, presets, command, naming.note))


def with_fair_budget(plan: StudyPlan) -> StudyPlan:
    """Return the plan with equal trials if its preset asks for equal tokens and no epochs are searched.

    All trials then train on the same rows, and what a pruner saves in an arm is no smaller search.
    """
    preset = plan.settings.space.equal == plan.study.fairness.equal == "tokens"
    if not preset or plan.searches_epochs or "fairness.equal=" in plan.command:
        return plan
    fairness = plan.study.fairness.model_copy(update={"equal": "trials"})
    return replace(plan, study=plan.study.model_copy(update={"fairness": fairness}))


def _untracked_baseline(study: StudySettings, config: Mapping[str, Any]) -> list[str]:
    tracked = config.get("tracking", {}).get("kind") != "none"
    if study.baseline.run_id is None or tracked:
        return []
    return [
        f"baseline.run_id={study.baseline.run_id}: tracking=none leaves no MLflow to find that run in. "
        "Set tracking=mlflow"
    ]


def _gap_without_unit(study: StudySettings, config: Mapping[str, Any]) -> list[str]:
    """Return a problem if pruner=gap could not compare looks with final values."""
    if study.pruner.name != "gap":
        return []
    objective = validate(Objective, config["objective"])
    if objective.judged_while_training == objective.metric:
        return []
    return [
        "pruner=gap: its unit is the difference of looks and final values, but looks measure "
        f"{objective.judged_while_training} and values {objective.metric}. Set pruner=median"
    ]


def _library_problems(study: StudySettings) -> list[str]:
    """Return problems with Optuna classes that do not exist or do not take the given arguments."""
    problems: list[str] = []
    for make in (
        lambda: make_sampler(study.sampler, {}, study.n_trials),
        lambda: make_pruner(study.pruner),
    ):
        try:
            make()
        except ConfigError as error:
            problems += error.problems
    return problems


def _command(overrides: Sequence[str]) -> str:
    """Return the command to repeat: experiment first, the study's keys last, quoted for a shell."""
    typed = [text for text in overrides if not text.startswith("hydra.searchpath=")]
    return shlex.join(
        # hydra.searchpath is added by us for the user's own ./conf, so it is not repeated.
        [*sorted(typed, key=lambda text: text.lstrip("~+").startswith("hydra.")), "-m"]
    )


def _setting_problems(config: Mapping[str, Any]) -> list[str]:
    try:
        settings = RunSettings.model_validate(config)
    except ValidationError as error:
        return describe(error, RunSettings)
    # The fake trainer reads no data, so a missing file is no mistake there.
    if settings.workers.trainer == "fake":
        return []
    problems = path_problems(settings.data, settings.evaluation.general_text, settings.made_by)
    base = settings.model.base_model
    if missing := not_made(base, settings.made_by):
        problems.append(f"model.base_model={missing}")
    elif problem := irregular_in(Path(base).expanduser()):
        problems.append(f"model.base_model={base}: {problem}")
    return problems


def _part(key: str) -> str:
    return key.split(".")[0]


def _given_twice(fixed: Sequence[str], swept: Mapping[str, str]) -> list[str]:
    """Return a problem for each key given both as a value and as a search."""
    return [
        f"{text} and {key}={swept[key]}: {key} is given twice, once as a value and once as a search. "
        "Keep one of them"
        for text in fixed
        if (key := compose.key_of(text)) in swept
    ]


def _unknown_keys(swept: Mapping[str, Scalar], composition: compose.Composition) -> list[str]:
    """Return, for each searched key that is neither a setting nor a group, what to type instead."""
    unknown = [
        key for key in swept if key not in composition.choices and not _has(composition.config, key)
    ]
    return [
        moved(f"{key}={swept[key]}")
        or f"{key}={swept[key]}: no such key to search; {compose.unknown_key(key, composition)}"
        for key in unknown
    ]


def _has(config: Mapping[str, Any], key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not (isinstance(node, Mapping) and part in node):
            return False
        node = node[part]
    return True


def _arms(
    study: StudySettings,
    fixed: Sequence[str],
    swept: Mapping[str, str],
    composition: compose.Composition,
) -> tuple[ArmPlan, ...]:
    """Build the lora arm and the further arms. Command-line values of searched keys reach lora only."""
    searched = {**study.params, **swept}
    # A learning rate given for LoRA would be ten times too high for full fine-tuning.
    own = [text for text in fixed if compose.key_of(text) in searched]
    shared = [text for text in fixed if text not in own]
    params = {key: searched[key] for key in searched if key not in set(map(compose.key_of, own))}
    common = _shared_params(study, fixed, swept, composition)
    problems: list[str] = []
    arms: list[ArmPlan] = []
    blueprints = [
        (
            LORA,
            [*shared, *own],
            _with_shared(params, common),
            study.priors,
            study.n_trials,
            study.sampler,
        ),
        *(
            (
                name,
                [*_without_replaced_groups(shared, arm.overrides), *arm.overrides],
                _with_shared(arm.params, {} if _is_adopted(study, name) else common),
                arm.priors,
                arm.n_trials,
                _arm_sampler(study.sampler, arm.sampler),
            )
            for name, arm in _rivals(study).items()
        ),
    ]
    for blueprint in blueprints:
        try:
            arms.append(_arm(*blueprint))
        except ConfigError as error:
            problems += error.problems
    problems += _other_objectives(arms)
    problems += _equal_repeats(study, arms)
    problems += _other_places(arms, composition)
    if problems:
        raise ConfigError(problems)
    run_id, rivals = study.baseline.run_id, _rivals(study)
    arms = [replace(arm, refine=arm.name in rivals and rivals[arm.name].refine) for arm in arms]
    return tuple(replace(arm, run_id=run_id) if arm.name == FULL else arm for arm in arms)


def _with_shared(params: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an arm, followed by those that every arm searches and it does not name."""
    return {**params, **{key: words for key, words in common.items() if key not in params}}


def _shared_params(
    study: StudySettings,
    fixed: Sequence[str],
    swept: Mapping[str, str],
    composition: compose.Composition,
) -> dict[str, Any]:
    """Return the keys that every arm searches, as the command line changes them."""
    given, training = set(map(compose.key_of, fixed)), composition.config["training"]
    if training["max_steps"] is not None:
        given.add(EPOCHS)  # the steps decide how long a trial trains
    shared = {key: words for key, words in study.shared_params.items() if key not in given}
    if isinstance(shared.get(BATCH), str):
        size, devices = training["per_device_train_batch_size"], training["devices_per_trial"]
        shared[BATCH] = shareable_batches(shared[BATCH], size, devices)
    return {key: swept.get(key, words) for key, words in shared.items()}


def shareable_batches(words: str, size: int, devices: int) -> str:
    """Return the batches of a choice that the devices of a trial can share evenly.

    Args:
        words: the choice of training.gradient_accumulation_steps, in the words of a search space.
        size: examples of a step without accumulation.
        devices: devices of a trial.
    """
    try:
        domain = grammar.parse_domain(BATCH, words)
    except ValueError:  # the space's own message says what is wrong with it
        return words
    if not isinstance(domain, Choice):
        return words
    fitting = [
        steps for steps in domain.values if isinstance(steps, int) and size * steps % devices == 0
    ]
    # Without any, the settings' own message says what does not fit
    return str(Choice(tuple(fitting))) if fitting else words


def _is_adopted(study: StudySettings, name: str) -> bool:
    """Return True if an earlier run replaces an arm, which then searches nothing."""
    return study.baseline.run_id is not None and name == FULL


def _rivals(study: StudySettings) -> dict[str, ArmSettings]:
    """Build the further arms. An arm that an earlier run replaces has no search space."""
    if study.baseline.run_id is None:
        return study.arms
    own = study.arms.get(FULL)
    overrides = list(FULL_OVERRIDES) if own is None else own.overrides
    # the adopted run is the arm's only trial
    return {**study.arms, FULL: ArmSettings(overrides=overrides, n_trials=1, params={})}


def _other_objectives(arms: Sequence[ArmPlan]) -> list[str]:
    """Return a problem for each arm whose objective differs: arms are compared by one objective."""
    return [
        f"arm {arm.name}: its objective ({arm.settings.objective.metric}) is not that of arm "
        f"{arms[0].name} ({arms[0].settings.objective.metric}). Set the objective for all arms"
        for arm in arms
        if arm.settings.objective != arms[0].settings.objective
    ]


def _equal_repeats(study: StudySettings, arms: Sequence[ArmPlan]) -> list[str]:
    """Return a problem if the seeds of finalists would repeat the same training."""
    wanted = study.finalists
    if not wanted.top or max(wanted.seeds - 1, wanted.fresh_seeds) < 1:
        return []
    fixed = [arm for arm in arms if None not in (arm.settings.seed_init, arm.settings.seed_data)]
    return [
        "seed_init and seed_data are both given, so the seeds of the finalists would differ in dropout "
        "alone, and their spread would mean nothing. Leave one of them null, or set finalists.top=0"
    ][: len(fixed)]


def _other_places(arms: Sequence[ArmPlan], composition: compose.Composition) -> list[str]:
    """Return a problem for each arm that writes elsewhere, or imports other code, than the study."""
    return [
        f"arm {arm.name}: {problem}"
        for arm in arms
        for problem in differing_places(compose.compose(arm.overrides).written, composition.written)
    ]


def _arm_sampler(sampler: SamplerSettings, name: str | None) -> SamplerSettings:
    if name is None:
        return sampler
    return sampler.model_copy(update={"name": name, "class_name": None, "kwargs": {}})


def _without_replaced_groups(shared: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Drop the shared overrides of groups that an arm replaces (adapter=none drops adapter.*)."""
    replaced = {compose.key_of(text) for text in overrides}
    return [text for text in shared if _part(compose.key_of(text)) not in replaced]


def _arm(
    name: str,
    overrides: Sequence[str],
    params: Mapping[str, Any],
    priors: Sequence[Mapping[str, Any]],
    n_trials: int,
    sampler: SamplerSettings,
) -> ArmPlan:
    overrides = compose.with_auto_groups(overrides)
    composition, problems = compose.compose_leniently(overrides)
    problems += _setting_problems(composition.config)
    space, fixed, space_problems = grammar.parse_space(
        params, lambda key: key in composition.choices or _has(composition.config, key)
    )
    problems += space_problems
    problems += [
        f"{key} is decided twice: it stands in a branch and beside it"
        for key in sorted(decided_twice({**space, **{key: Choice((fixed[key],)) for key in fixed}}))
    ]
    if not problems:
        # Only with a sound space: its points would repeat the same errors otherwise.
        problems += _point_problems(space, fixed, overrides)
        objective = validate(Objective, composition.config["objective"])
        problems += _incomparable_models(space, objective)
    problems += _never_searched(space)
    named, plain, wrong = _read_priors(priors)
    problems += wrong
    points = [_prior(prior, space) for prior in plain]
    if points and sampler.name == "grid":
        problems.append(
            "sampler=grid tries every point, so priors change nothing. Set hydra.sweeper.priors=[]"
        )
    count = _grid_count(space, n_trials, sampler, problems)
    if problems:
        raise ConfigError(
            [problem if name == LORA else f"arm {name}: {problem}" for problem in problems]
        )
    texts = (*overrides, *_as_overrides(fixed))
    settings = validate(RunSettings, compose.compose(texts).config)
    values = flatten(settings.trial.model_dump(mode="json"))
    recipes, parts = known_points(named, space, values)
    return ArmPlan(
        name,
        texts,
        space,
        tuple(points),
        count,
        sampler,
        settings,
        recipes=tuple(recipes),
        recipe_parts=tuple(parts),
    )


def _read_priors(
    priors: Sequence[Mapping[str, Any]],
) -> tuple[list[RecipeSettings], list[Mapping[str, Any]], list[str]]:
    """Return the recipes among an arm's priors, its plain points, and the problems found."""
    named: list[RecipeSettings] = []
    problems: list[str] = []
    for index, prior in enumerate(priors):
        if "point" in prior:
            try:
                named.append(validate(RecipeSettings, prior, f"priors[{index}]"))
            except ConfigError as error:
                problems += error.problems
    return named, [prior for prior in priors if "point" not in prior], problems


def _never_searched(space: Space) -> list[str]:
    return [
        f"{key}: {NEVER_SEARCHED[part]}"
        for key in sorted(keys(space))
        if (part := _part(key)) in NEVER_SEARCHED
    ]


def _incomparable_models(space: Space, objective: Objective) -> list[str]:
    """Return problems of spaces that search base models by a metric that depends on the tokenizer."""
    judges = {"metric": objective.metric, "pruning_metric": objective.judged_while_training}
    wrong = next((key for key, metric in judges.items() if metric in PER_TOKEN), None)
    if wrong is None:
        return []
    return [
        f"{key}: cannot be searched by {judges[wrong]}, which depends on the model's tokenizer. "
        f"Searching it needs objective.{wrong}=eval/bits_per_byte"
        for key in sorted(keys(space))
        if _part(key) == "model"
    ]


def _prior(prior: Mapping[str, Any], space: Space) -> Point:
    """Reduce a prior to the searched keys. A fixed key keeps its fixed value."""
    searched = keys(space, labels=True)
    return {key: value for key, value in prior.items() if key in searched}


def _point_problems(space: Space, fixed: Point, overrides: Sequence[str]) -> list[str]:
    """Return settings errors at the ends of every domain, one key at a time."""
    problems: list[str] = []
    for point in ({**fixed, **found} for found in list(probes(space)) or [{}]):
        values = {key: value for key, value in point.items() if "." in key}
        groups = _as_overrides({key: point[key] for key in point if key not in values})
        composition, found = compose.compose_leniently([*overrides, *groups])
        found += _unknown_keys(values, composition)
        if not found:
            found = _setting_problems(compose.with_values(composition.unresolved, values))
        problems += [problem for problem in found if problem not in problems]
    return problems


def _grid_count(space: Space, n_trials: int, sampler: SamplerSettings, problems: list[str]) -> int:
    """Return n_trials, limited to the number of points of a grid."""
    if sampler.name != "grid":
        return n_trials
    try:
        # counted up to n_trials only: a short text may describe a grid of a billion points
        return sum(1 for _ in itertools.islice(grid(space), n_trials))
    except ValueError as error:
        problems.append(str(error))
        return n_trials
