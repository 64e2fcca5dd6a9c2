"""Results of a study as plain values, read from its storage. results.json is their dump.

Reads Optuna's storage and the study's folder. Needs no worker, no torch and no MLflow.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from sweeper.config.settings import FairnessRules, LoraAdapter, Objective, flatten, require_arm_name
from sweeper.config.space import Choice, Interval, Point, Scalar, Space, grid, keys, locate
from sweeper.core.errors import StudyError
from sweeper.core.outcome import (
    ArmBaseline,
    BaselineRun,
    Outcome,
    device_seconds,
    trained_tokens,
)
from sweeper.core.paths import StudyFolder, read_json
from sweeper.core.references import referenced_tree
from sweeper.core.stored_files import damage
from sweeper.core.value import EquivalenceMargin, FrozenValue, MemoryShortfall
from sweeper.reporting.finalist_results import FinalistRanking
from sweeper.reporting.intervals import ArmContrast, IntervalEstimate
from sweeper.reporting.served_forms import ServedContrast
from sweeper.search.known_points import EARLIER_PRIORS
from sweeper.search.pruning_audit import PruningAudit, audit
from sweeper.search.search_outlook import SearchOutlook, stored_outlook
from sweeper.search.states import STATES
from sweeper.search.study import RECIPES, REFINES, shown_point
from sweeper.search.study_plan import ArmPlan
from sweeper.search.telling import counts

FORMAT = 4
"""Version of results.json. It rises only when a reader of the version before would be misled: a new
key with a default leaves it as it is.
"""
NEWER = "a newer version wrote it: read it with that version"
DERIVED = {"format", "verdict"}
"""Keys of results.json that readers of other programs want, and that follow from the others."""
DERIVED_OF_ARM = {"best", "audit"}


class SearchedRange(FrozenValue):
    """The numbers that one key was searched over: some values, or all between the first and the last."""

    values: tuple[float, ...]
    continuous: bool


class TrialResult(FrozenValue):
    """One finished trial. In results.json its outcome's keys stand next to its own."""

    arm: str = Field(exclude=True)
    number: int
    params: Mapping[str, Scalar]
    audited: bool = False
    """True if the pruner would have stopped the trial, which was kept running as an audit."""
    outcome: Outcome

    @model_validator(mode="before")
    @classmethod
    def _with_outcome(cls, trial: dict[str, Any]) -> dict[str, Any]:
        # Made in Python, and not read from results.json.
        if "outcome" in trial:
            return trial
        own = trial.keys() & cls.model_fields.keys()
        outcome = {key: value for key, value in trial.items() if key not in own}
        return {**{key: trial[key] for key in own}, "outcome": outcome}

    @model_serializer(mode="wrap")
    def _flat(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        outcome = fields.pop("outcome")
        return {**fields, **outcome}

    @property
    def value(self) -> float | None:
        """The objective's value of the kept checkpoint, or None if the trial must not be compared by
        it.
        """
        feasible = not STATES[self.outcome.cause].infeasible
        return self.outcome.best_value if feasible else None

    @property
    def complete(self) -> bool:
        """True if the trial ran to its own end, so that it can be the best."""
        return STATES[self.outcome.cause].complete

    def metric(self, name: str) -> float | None:
        """Return a metric of the trial, or None if it has none of that name."""
        return self.outcome.metrics.get(name)


class ArmResult(FrozenValue):
    """An arm: its baseline and its trials, the best first."""

    name: str = Field(exclude=True)
    method: str
    base: str
    n_trials: int
    objective: Objective = Field(exclude=True)
    facts: ArmBaseline
    trials: tuple[TrialResult, ...]
    settings: Mapping[str, Any]
    """The arm's settings as dotted keys, before any point of its space."""
    ranges: Mapping[str, SearchedRange]
    """The searched numbers, by key."""
    exhaustive: bool
    """True if the space is a grid and the arm tries all of it."""
    costs: tuple[str, ...] = ()
    """Metrics that are minimised together with the objective."""
    front: tuple[int, ...] = ()
    """Numbers of the trials on the Pareto front of objective and costs."""
    final: FinalistRanking | None = None
    """The ranking of the finalists, once they are trained."""
    adopted: BaselineRun | None = None
    """The earlier run that replaces the search. Costs and training are then that run's."""
    finalist_seconds: float | None = None
    """Device seconds of the trainings with further seeds, as budgets count them. None: an older version
    stored the results."""
    priors: int | None = None
    """Number of known-good points that were tried first. None: an older version stored the results."""
    recipes: tuple[str, ...] = ()
    """Names of those of these points that are recipes."""
    refined: int = 0
    """Number of trials beside the best one of the grid."""
    outlook: SearchOutlook | None = None
    """A guess of what further trials would bring. None: the search has not ended, no model describes it,
    or an older version ended it."""

    @model_validator(mode="before")
    @classmethod
    def _of_document(cls, arm: dict[str, Any]) -> dict[str, Any]:
        trials = [
            {**trial, "arm": arm["name"]} if isinstance(trial, dict) else trial
            for trial in arm["trials"]
        ]
        stored = {key: value for key, value in arm.items() if key not in DERIVED_OF_ARM}
        return {**stored, "trials": trials}

    @model_serializer(mode="wrap")
    def _with_derived(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        best = None if self.best is None else self.best.number
        return {**dump(self), "best": best, "audit": self.audit and asdict(self.audit)}

    @property
    def base_value(self) -> float:
        """The objective's value of the untuned base with this arm's quantization."""
        return self.facts.base_value(self.objective.metric)

    def setting(self, key: str) -> Any:
        """Return a setting of the best trial, or of all trials if it is not searched."""
        assert self.best is not None
        return self.best.params.get(key, self.trained_with.get(key))

    @cached_property
    def trained_with(self) -> Mapping[str, Any]:
        """Return the arm's settings, or an adopted model's as its run recorded them."""
        if self.adopted is None:
            return self.settings
        run = self.adopted.settings
        kept = {key: value for key, value in self.settings.items() if not _is_training(key)}
        return {**kept, **{key: value for key, value in run.items() if _is_training(key)}}

    @property
    def finished(self) -> int:
        """The trials that ran to their own end."""
        return sum(trial.complete for trial in self.trials)

    @cached_property
    def tokens(self) -> float:
        """Tokens trained on in all trials."""
        return sum(trained_tokens(trial.outcome.spent) for trial in self.trials)

    @property
    def audit(self) -> PruningAudit | None:
        """The pruner's error rate, or None without audits."""
        complete = [trial for trial in self.trials if trial.complete]
        return audit(
            self.objective,
            [trial.value for trial in complete if trial.value is not None and not trial.audited],
            [trial.value for trial in complete if trial.value is not None and trial.audited],
        )

    @property
    def best(self) -> TrialResult | None:
        """The complete trial with the best value, or the one whose configuration won over the seeds."""
        if self.final is not None:
            return next(trial for trial in self.trials if trial.number == self.final.winner)
        complete = (trial for trial in self.trials if trial.complete and trial.value is not None)
        return next(complete, None)  # they are sorted that way

    @property
    def tried(self) -> int:
        """The trials that were trained and ended on their own."""
        idle = ("refused", "duplicate", "cancelled")
        return sum(trial.outcome.cause not in idle for trial in self.trials)

    @property
    def seconds_per_trial(self) -> float | None:
        """Median worker seconds of the complete trials. A single time is too noisy to compare."""
        times = [trial.metric("cost/seconds") for trial in self.trials if trial.complete]
        known = [seconds for seconds in times if seconds is not None]
        return statistics.median(known) if known else None

    @property
    def device_seconds(self) -> float:
        """Device seconds of all that the arm cost: its search, and its finalists' further seeds."""
        if self.finalist_seconds is not None:
            return self.seconds + self.finalist_seconds
        listed = () if self.final is None else self.final.finalists
        # The first seed of each finalist is the search's own trial.
        further = [repeat.outcome for each in listed for repeat in each.repeats[1:]]
        return self.seconds + sum(device_seconds(each.metrics) for each in further if each)

    @cached_property
    def seconds(self) -> float:
        """Device seconds of the search's trials."""
        if self.adopted is not None:
            return self.adopted.seconds
        return sum(device_seconds(trial.outcome.spent) for trial in self.trials)


class StudyResults(FrozenValue):
    """A whole study. results.json is its dump with the verdict added."""

    study_name: str
    command: str
    provenance: Mapping[str, str]
    """Date, code, packages and machine of the run that wrote these results."""
    fairness: FairnessRules
    contrasts: tuple[ArmContrast, ...] = ()
    """Contrasts of arms with their reference on the test split, once finalists were judged on it."""
    recipe_contrasts: tuple[ArmContrast, ...] = ()
    """Contrasts of arms' winners with their recipes on the test split. Empty where recipes have won."""
    forgetting: tuple[ArmContrast, ...] = ()
    """Contrasts of arms with their untuned base on general text, once finalists were judged on it."""
    served: tuple[ServedContrast, ...] = ()
    """Contrasts of winners as they are served with their trained form, on the test split."""
    untested: str | None = None
    """Reason why the arms are not compared on the test split, for the user."""
    equivalence_margin: EquivalenceMargin | None = None
    """The largest difference that counts as none, fixed before the first trial. None: not tested."""
    look: int | None = None
    """Number of this look at the test split in the study's family. None: an older version looked."""
    other_looks: int = 0
    """Looks at the same test split by other studies in the same folder."""
    protocol: str | None = None
    """Name of the protocol of the comparison. None: an older version stored the results."""
    pruner: str | None = None
    """Name of the pruner that all arms share. None: an older version stored the results."""
    misfits: Mapping[str, MemoryShortfall] = Field(default_factory=dict)
    """Arms that were not run because their trainings exceed the device's memory, by name."""
    arms: tuple[ArmResult, ...]

    @model_validator(mode="before")
    @classmethod
    def _of_document(cls, results: dict[str, Any]) -> dict[str, Any]:
        # Made in Python, and not read from results.json.
        if not isinstance(results.get("arms"), dict):
            return results
        for name in results["arms"]:
            require_arm_name(name)
        shared = {"objective": results["objective"]}
        arms = [{**arm, "name": name, **shared} for name, arm in results["arms"].items()]
        stored = {key: results[key] for key in results.keys() - DERIVED - shared.keys()}
        return {**stored, "arms": arms}

    @model_serializer(mode="wrap")
    def _document(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        arms = zip(self.arms, fields.pop("arms"), strict=True)
        return {
            "format": FORMAT,
            **fields,
            "objective": self.objective.model_dump(mode="json"),
            "arms": {arm.name: document for arm, document in arms},
        }

    @property
    def objective(self) -> Objective:
        """The objective that all arms share."""
        return self.arms[0].objective

    @property
    def decisive(self) -> tuple[ArmContrast, ...]:
        """Contrasts that the verdict may rest on: those of the objective's metric."""
        return tuple(each for each in self.contrasts if each.metric == self.compared_metric)

    @property
    def compared_metric(self) -> str:
        """The metric by which arms are compared on the test split."""
        metric = self.objective.metric
        # A perplexity is the loss on another scale, and its mean over seeds is not.
        return "eval/loss" if metric == "eval/perplexity" else metric

    def contrast(self, name: str) -> ArmContrast | None:
        """Return the contrast of an arm with its reference on the test split."""
        return next((found for found in self.decisive if found.arm == name), None)

    def recipe_contrast(self, name: str) -> ArmContrast | None:
        """Return the contrast of an arm's winner with its recipe on the test split."""
        metric = self.compared_metric
        found = (each for each in self.recipe_contrasts if each.metric == metric)
        return next((each for each in found if each.arm == name), None)

    def forgotten(self, name: str) -> IntervalEstimate | None:
        """Return an arm's forgetting: the increase of its winner's loss on general text, in nats per
        token.
        """
        found = (each.difference for each in self.forgetting if each.arm == name)
        return next(found, None)

    def seeds(self, name: str) -> int:
        """Return the number of seeds with which an arm's best configuration was judged."""
        counts = {
            arm.name: len(arm.final.test_losses) or arm.final.usable or 1
            for arm in self.arms
            if arm.final is not None
        }
        counts |= {found.arm: found.seeds[0] for found in self.contrasts}
        counts |= {found.reference: found.seeds[1] for found in self.contrasts}
        return counts.get(name, 1)


def collect_arm(
    arm: ArmPlan,
    study: optuna.Study,
    costs: Sequence[str] = (),
    finalist_seconds: float | None = None,
) -> ArmResult:
    """Collect an arm's results from its storage."""
    # How long the judging took is of one start only: the answer of a study stays as it was
    facts = ArmBaseline.model_validate({**study.user_attrs["facts"], "judging_s": None})
    stored = study.user_attrs.get("adopted")
    adopted = None if stored is None else BaselineRun.model_validate(stored)
    trials = [
        TrialResult(
            arm=arm.name,
            number=frozen.number,
            params=shown_point(frozen),
            outcome=_at_the_costs_of(adopted, Outcome.model_validate(frozen.user_attrs["outcome"])),
            audited=bool(frozen.user_attrs.get("audited", False)),
        )
        for frozen in study.get_trials(deepcopy=False)
        if frozen.state.is_finished() and "outcome" in frozen.user_attrs
    ]
    complete = {trial.number for trial in trials if trial.complete}
    front = (
        [trial.number for trial in study.best_trials if trial.number in complete] if costs else []
    )
    return ArmResult(
        name=arm.name,
        n_trials=arm.n_trials,
        method=_method(arm),
        base=_base_name(arm, facts),
        objective=arm.settings.objective,
        facts=facts,
        trials=rank(trials, arm.settings.objective),
        settings=flatten(referenced_tree(arm.settings.trial.model_dump(mode="json"))),
        ranges=number_ranges(arm.space),
        exhaustive=arm.sampler.name == "grid" and _has_all_of(arm.n_trials, grid(arm.space)),
        costs=tuple(costs),
        front=tuple(front),
        adopted=adopted,
        finalist_seconds=finalist_seconds,
        priors=len(arm.priors) + _recipes_tried(arm, study),
        recipes=tuple(recipe.name for recipe in arm.recipes),
        refined=sum(
            counts(t) and REFINES in t.user_attrs for t in study.get_trials(deepcopy=False)
        ),
        outlook=stored_outlook(study),
    )


def _recipes_tried(arm: ArmPlan, study: optuna.Study) -> int:
    """Return how many known points of the defaults a study began with, whichever version opened it."""
    if arm.sampler.name == "grid":  # its points have an order of their own
        return 0
    if RECIPES in study.user_attrs:
        return len(arm.recipes) + len(arm.recipe_parts)
    trials = study.get_trials(deepcopy=False)
    queued = [trial.system_attrs.get("fixed_params", {}) for trial in trials]
    earlier = [draw for point in EARLIER_PRIORS if (draw := locate(arm.space, _within(arm, point)))]
    return sum(draw in queued for draw in earlier)


def _within(arm: ArmPlan, point: Point) -> Point:
    return {key: value for key, value in point.items() if key in keys(arm.space)}


def _has_all_of(count: int, points: Iterable[object]) -> bool:
    """Return True if n_trials covers the grid, without listing all of a larger grid."""
    return sum(1 for _ in itertools.islice(points, count + 1)) <= count


def equal_size(arm: ArmResult) -> bool:
    """Return True if the arm's ranks follow from adapter.trainable_parameters."""
    key = "adapter.trainable_parameters"
    return arm.settings.get(key) is not None or any(key in trial.params for trial in arm.trials)


def _at_the_costs_of(adopted: BaselineRun | None, outcome: Outcome) -> Outcome:
    """Return the trial with the costs of its original training, where this study only judged it."""
    if adopted is None:
        return outcome
    own = {
        name: value
        for name, value in outcome.metrics.items()
        if not name.startswith("cost/") or name == "cost/artifact_mib"
    }
    return outcome.model_copy(update={"metrics": {**own, **adopted.costs}})


def _is_training(key: str) -> bool:
    return key.startswith("training.")


def headline(results: StudyResults) -> tuple[dict[str, float], Point]:
    """Return the metrics and the point of the first arm's best trial, for the study's own run."""
    arm = results.arms[0] if results.arms else None
    if arm is None or arm.best is None:
        return {}, {}
    unseen = {} if arm.final is None else arm.final.metrics
    name = f"{arm.name}/{arm.best.number:04d}"
    return {**arm.best.outcome.metrics, **unseen}, {"trial": name, **arm.best.params}


def number_ranges(space: Space) -> dict[str, SearchedRange]:
    """Return the domains of a space that are ranges of numbers."""
    ranges: dict[str, SearchedRange] = {}
    for key, domain in space.items():
        if isinstance(domain, Interval):
            ranges[key] = SearchedRange(values=(domain.low, domain.high), continuous=True)
        elif isinstance(domain, Choice):
            numbers = [
                float(value)
                for value in domain.values
                if isinstance(value, int | float) and not isinstance(value, bool)
            ]
            if len(numbers) == len(domain.values) and len(set(numbers)) > 1:
                ranges[key] = SearchedRange(values=tuple(sorted(set(numbers))), continuous=False)
    return ranges


def _method(arm: ArmPlan) -> str:
    """Return the arm's method: LoRA, QLoRA, DoRA, full fine-tuning, …"""
    settings = arm.settings
    if not isinstance(settings.adapter, LoraAdapter):
        return "full fine-tuning"
    if any(key.split(".")[0] == "quantization" for key in keys(arm.space)):
        return "LoRA or QLoRA"
    return "QLoRA" if settings.quantization.load_in_4bit else "LoRA"


def _base_name(arm: ArmPlan, facts: ArmBaseline) -> str:
    """Return the base's quantization or dtype: nf4, fp4, int8, bf16, …"""
    kind = arm.settings.quantization.kind
    return facts.dtype if kind == "none" else kind


def load_results(study_name: str, output_dir: Path) -> StudyResults:
    """Read a study's results.

    Raises:
        StudyError: there is no such study, or its results.json is of another format. Lists the
            studies.
    """
    path = StudyFolder(output_dir / study_name).results
    if not path.exists():
        names = sorted(found.parent.name for found in output_dir.glob("*/results.json"))
        known = f"studies there: {', '.join(names)}" if names else "there are no studies yet"
        raise StudyError(f"no results of a study {study_name!r} under {output_dir}/; {known}")
    # the folder's name, because the file may have been moved, or written by anybody
    return _read(path).model_copy(update={"study_name": path.parent.name})


def _read(path: Path) -> StudyResults:
    try:
        document = read_json(path)
    except (ValueError, RecursionError):
        raise StudyError(f"{path} holds no JSON object; {_written_again({})}") from None
    found = document.get("format")
    if found != FORMAT:
        raise StudyError(
            f"{path} is of format {found}, this version reads format {FORMAT}; "
            + (NEWER if isinstance(found, int) and found > FORMAT else _written_again(document))
        )
    try:
        return from_document(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path}: {_first(error)}; {_written_again(document)}") from None


def _first(error: Exception) -> str:
    return f"{error.args[0]}: missing" if isinstance(error, KeyError) else damage(error)


def _written_again(document: Mapping[str, Any]) -> str:
    """Return the command that writes results.json again from the study's storage."""
    command = document.get("command", "THE STUDY'S COMMAND")
    return (
        "to keep its answer, run its command: it trains no finished trial again, and writes the file "
        f"in this version's format: python -m sweeper {command}"
    )


def rank(trials: list[TrialResult], objective: Objective) -> tuple[TrialResult, ...]:
    """Return the rank order: complete trials by value, then pruned ones by value, then failed ones."""

    def order(trial: TrialResult) -> tuple[int, float, int]:
        if trial.value is None:
            return 2, 0.0, trial.number
        return 0 if trial.complete else 1, objective.order(trial.value), trial.number

    return tuple(sorted(trials, key=order))


def to_document(results: StudyResults) -> dict[str, Any]:
    """Return the content of results.json without the verdict."""
    return results.model_dump(mode="json")


def from_document(document: Mapping[str, Any]) -> StudyResults:
    """Return the results in a document of results.json.

    Raises:
        ValidationError: the document is not of this version's format.
    """
    return StudyResults.model_validate(document)
