"""Results: what a study's storage says, as plain values ready to be shown.

Reads Optuna's storage and the study's folder; needs no worker, no torch and no MLflow.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna

from sweeper.config.settings import FairnessRules, LoraAdapter, Objective, flatten
from sweeper.config.space import Choice, Interval, Point, Scalar, Space, grid, keys
from sweeper.core.errors import StudyError
from sweeper.core.outcome import ArmBaseline, BaselineRun, Outcome, device_seconds
from sweeper.core.paths import StudyFolder, read_json
from sweeper.core.value import FrozenValue, MemoryShortfall
from sweeper.reporting.finalist_results import FinalistRanking
from sweeper.reporting.intervals import ArmContrast, IntervalEstimate
from sweeper.search.pruning_audit import PruningAudit, audit
from sweeper.search.states import STATES
from sweeper.search.study import shown_point
from sweeper.search.study_plan import ArmPlan

FORMAT = 4
"""Of results.json; another version's is not read."""


class SearchedRange(FrozenValue):
    """The numbers that one key was searched over: some values, or all between the first and the last."""

    values: tuple[float, ...]
    continuous: bool


@dataclass(frozen=True)
class TrialResult:
    """One finished trial."""

    arm: str
    number: int
    point: Mapping[str, Scalar]
    outcome: Outcome
    audited: bool = False
    """Whether the pruner would have stopped it, and it went on to find out if that was right."""

    @property
    def value(self) -> float | None:
        """The objective's value of the kept checkpoint, if the trial may be compared by it."""
        feasible = not STATES[self.outcome.cause].infeasible
        return self.outcome.best_value if feasible else None

    @property
    def complete(self) -> bool:
        """Whether it ran to its own end, so that it can be the best."""
        return STATES[self.outcome.cause].complete

    def metric(self, name: str) -> float | None:
        """A figure of the trial, if it has it."""
        return self.outcome.metrics.get(name)


@dataclass(frozen=True)
class ArmResult:
    """An arm: what it started from, and its trials, the best first."""

    name: str
    wanted: int
    method: str
    base: str
    objective: Objective
    facts: ArmBaseline
    trials: tuple[TrialResult, ...]
    settings: Mapping[str, Any]
    """This study's for its trials, as dotted keys, before any point of its space."""
    ranges: Mapping[str, SearchedRange]
    """Of the searched keys that are numbers."""
    exhaustive: bool
    """Its space is a grid, and the arm walks all of it."""
    costs: tuple[str, ...] = ()
    """Metrics that are minimised beside the objective."""
    front: tuple[int, ...] = ()
    """Numbers of the trials on the Pareto front of objective and costs."""
    final: FinalistRanking | None = None
    """How its best configurations did over several seeds, once that is known."""
    adopted: BaselineRun | None = None
    """The earlier run that stands in for its search; costs and training are then that run's."""

    @property
    def base_value(self) -> float:
        """The objective's value of the untuned base, as this arm holds it."""
        return self.facts.base_value(self.objective.metric)

    def setting(self, key: str) -> Any:
        """A setting of its best trial; of all its trials if it is not searched."""
        assert self.best is not None
        return self.best.point.get(key, self.trained_with.get(key))

    @cached_property
    def trained_with(self) -> Mapping[str, Any]:
        """Its settings; how an adopted model was trained only its run knows."""
        if self.adopted is None:
            return self.settings
        run = self.adopted.settings
        kept = {key: value for key, value in self.settings.items() if not _is_training(key)}
        return {**kept, **{key: value for key, value in run.items() if _is_training(key)}}

    @property
    def finished(self) -> int:
        """Trials that ran to their own end."""
        return sum(trial.complete for trial in self.trials)

    @cached_property
    def tokens(self) -> float:
        """Tokens trained on in all trials."""
        return sum(
            trial.outcome.spent.get("cost/tokens_per_second", 0.0)
            * trial.outcome.spent.get("cost/train_seconds", 0.0)
            for trial in self.trials
        )

    @property
    def audit(self) -> PruningAudit | None:
        """How often the pruner was wrong, if it was audited."""
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
        """Trials that were trained to some end of their own."""
        idle = ("refused", "duplicate", "cancelled")
        return sum(trial.outcome.cause not in idle for trial in self.trials)

    @property
    def seconds_per_trial(self) -> float | None:
        """Median worker time of the complete trials; one trial's time is too noisy to compare."""
        times = [trial.metric("cost/seconds") for trial in self.trials if trial.complete]
        known = [seconds for seconds in times if seconds is not None]
        return statistics.median(known) if known else None

    @cached_property
    def seconds(self) -> float:
        """Device time of all trials."""
        if self.adopted is not None:
            return self.adopted.seconds
        return sum(device_seconds(trial.outcome.spent) for trial in self.trials)


@dataclass(frozen=True)
class StudyResults:
    """A study as a whole."""

    study_name: str
    command: str
    provenance: Mapping[str, str]
    """Date, code, packages and machine of the run that wrote these results."""
    arms: tuple[ArmResult, ...]
    fairness: FairnessRules
    contrasts: tuple[ArmContrast, ...] = ()
    """Arms against their reference on the test split, once finalists were judged on it."""
    forgetting: tuple[ArmContrast, ...] = ()
    """Arms against their untuned base on general text, once finalists were judged on it."""
    untested: str | None = None
    """Why the arms are not compared on the test split, for people."""
    misfits: Mapping[str, MemoryShortfall] = field(default_factory=dict)
    """Arms that were not run because their trainings are larger than the device, by name."""

    @property
    def objective(self) -> Objective:
        """What the trials of every arm are worth; the arms share it (search.plan)."""
        return self.arms[0].objective

    @property
    def decisive(self) -> tuple[ArmContrast, ...]:
        """The contrasts that the verdict may rest on: they are of losses, so only by that objective."""
        return self.contrasts if self.objective.metric == "eval/loss" else ()

    def contrast(self, name: str) -> ArmContrast | None:
        """How an arm did on the test split, against its reference."""
        return next((found for found in self.decisive if found.arm == name), None)

    def forgotten(self, name: str) -> IntervalEstimate | None:
        """How much worse an arm's winner is than its base on general text, in nats per token."""
        found = (each.difference for each in self.forgetting if each.arm == name)
        return next(found, None)

    def seeds(self, name: str) -> int:
        """With how many seeds an arm's best configuration was judged: on the test split, or once."""
        counts = {
            arm.name: len(arm.final.test_losses) or 1 for arm in self.arms if arm.final is not None
        }
        counts |= {found.arm: found.seeds[0] for found in self.contrasts}
        counts |= {found.reference: found.seeds[1] for found in self.contrasts}
        return counts.get(name, 1)


def collect_arm(arm: ArmPlan, study: optuna.Study, costs: Sequence[str] = ()) -> ArmResult:
    """What an arm has so far, from its storage."""
    facts = ArmBaseline.model_validate(study.user_attrs["facts"])
    stored = study.user_attrs.get("adopted")
    adopted = None if stored is None else BaselineRun.model_validate(stored)
    trials = [
        TrialResult(
            arm.name,
            frozen.number,
            shown_point(frozen),
            _at_the_costs_of(adopted, Outcome.model_validate(frozen.user_attrs["outcome"])),
            bool(frozen.user_attrs.get("audited", False)),
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
        wanted=arm.n_trials,
        method=_method(arm),
        base=_base_name(arm, facts),
        objective=arm.settings.objective,
        facts=facts,
        trials=rank(trials, arm.settings.objective),
        settings=flatten(arm.settings.trial.model_dump(mode="json")),
        ranges=number_ranges(arm.space),
        exhaustive=arm.sampler.name == "grid" and _has_all_of(arm.n_trials, grid(arm.space)),
        costs=tuple(costs),
        front=tuple(front),
        adopted=adopted,
    )


def _has_all_of(count: int, points: Iterable[object]) -> bool:
    """Without going through all of a grid that has far more."""
    return sum(1 for _ in itertools.islice(points, count + 1)) <= count


def equal_size(arm: ArmResult) -> bool:
    """Whether the arm's ranks follow from adapter.trainable_parameters."""
    key = "adapter.trainable_parameters"
    return arm.settings.get(key) is not None or any(key in trial.point for trial in arm.trials)


def _at_the_costs_of(adopted: BaselineRun | None, outcome: Outcome) -> Outcome:
    """What a training cost, where only a judgement was paid here."""
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
    """What a study's own run shows: the figures and the point of the first arm's best trial."""
    arm = results.arms[0] if results.arms else None
    if arm is None or arm.best is None:
        return {}, {}
    unseen = {} if arm.final is None else arm.final.metrics
    name = f"{arm.name}/{arm.best.number:04d}"
    return {**arm.best.outcome.metrics, **unseen}, {"trial": name, **arm.best.point}


def number_ranges(space: Space) -> dict[str, SearchedRange]:
    """The domains of a space that are ranges of numbers."""
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
    """What an arm does, in the field's words."""
    settings = arm.settings
    if not isinstance(settings.adapter, LoraAdapter):
        return "full fine-tuning"
    if any(key.split(".")[0] == "quantization" for key in keys(arm.space)):
        return "LoRA or QLoRA"
    return "QLoRA" if settings.quantization.load_in_4bit else "LoRA"


def _base_name(arm: ArmPlan, facts: ArmBaseline) -> str:
    """How an arm holds its base: nf4, fp4, int8, or the dtype."""
    kind = arm.settings.quantization.kind
    return facts.dtype if kind == "none" else kind


def load_results(study_name: str, output_dir: Path) -> StudyResults:
    """Read a study's results.

    Raises:
        StudyError: there is no such study; lists those that exist.
    """
    path = StudyFolder(output_dir / study_name).results
    if not path.exists():
        names = sorted(found.parent.name for found in output_dir.glob("*/results.json"))
        known = f"studies there: {', '.join(names)}" if names else "there are no studies yet"
        raise StudyError(f"no results of a study {study_name!r} under {output_dir}/; {known}")
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise StudyError(
            f"{path} was written by another version of sweeper; run the study's command again: "
            "finished trials are not trained again, and the file is written anew"
        )
    return from_document(document)


def rank(trials: list[TrialResult], objective: Objective) -> tuple[TrialResult, ...]:
    """Complete trials with the best value first, then pruned ones likewise, then the failed ones."""

    def order(trial: TrialResult) -> tuple[int, float, int]:
        if trial.value is None:
            return 2, 0.0, trial.number
        return 0 if trial.complete else 1, objective.order(trial.value), trial.number

    return tuple(sorted(trials, key=order))


def to_document(results: StudyResults) -> dict[str, Any]:
    """results.json."""
    return {
        "format": FORMAT,
        "study_name": results.study_name,
        "command": results.command,
        "provenance": dict(results.provenance),
        "objective": results.objective.model_dump(mode="json"),
        "fairness": results.fairness.model_dump(mode="json"),
        "contrasts": [contrast.model_dump(mode="json") for contrast in results.contrasts],
        "forgetting": [contrast.model_dump(mode="json") for contrast in results.forgetting],
        "untested": results.untested,
        "misfits": {name: found.model_dump(mode="json") for name, found in results.misfits.items()},
        "arms": {
            arm.name: {
                "method": arm.method,
                "base": arm.base,
                "n_trials": arm.wanted,
                "settings": dict(arm.settings),
                "ranges": {key: found.model_dump(mode="json") for key, found in arm.ranges.items()},
                "exhaustive": arm.exhaustive,
                "facts": arm.facts.model_dump(mode="json"),
                "best": None if arm.best is None else arm.best.number,
                "costs": list(arm.costs),
                "front": list(arm.front),
                "adopted": None if arm.adopted is None else arm.adopted.model_dump(mode="json"),
                "final": None if arm.final is None else arm.final.model_dump(mode="json"),
                "audit": None if arm.audit is None else asdict(arm.audit),
                "trials": [
                    {
                        "number": trial.number,
                        "params": dict(trial.point),
                        "audited": trial.audited,
                        **trial.outcome.model_dump(mode="json"),
                    }
                    for trial in arm.trials
                ],
            }
            for arm in results.arms
        },
    }


def from_document(document: Mapping[str, Any]) -> StudyResults:
    """Results back from results.json."""
    objective = Objective.model_validate(document["objective"])
    return StudyResults(
        study_name=document["study_name"],
        command=document["command"],
        provenance=document["provenance"],
        arms=tuple(_arm(name, arm, objective) for name, arm in document["arms"].items()),
        fairness=FairnessRules.model_validate(document["fairness"]),
        contrasts=tuple(ArmContrast.model_validate(found) for found in document["contrasts"]),
        forgetting=tuple(ArmContrast.model_validate(found) for found in document["forgetting"]),
        untested=document["untested"],
        misfits={
            name: MemoryShortfall.model_validate(found)
            for name, found in document["misfits"].items()
        },
    )


def _arm(name: str, document: Mapping[str, Any], objective: Objective) -> ArmResult:
    fields = set(Outcome.model_fields)
    trials = [
        TrialResult(
            arm=name,
            number=trial["number"],
            point=trial["params"],
            outcome=Outcome.model_validate({key: trial[key] for key in fields if key in trial}),
            audited=trial["audited"],
        )
        for trial in document["trials"]
    ]
    return ArmResult(
        name=name,
        wanted=document["n_trials"],
        method=document["method"],
        base=document["base"],
        objective=objective,
        facts=ArmBaseline.model_validate(document["facts"]),
        trials=rank(trials, objective),
        settings=document["settings"],
        ranges={
            key: SearchedRange.model_validate(found) for key, found in document["ranges"].items()
        },
        exhaustive=document["exhaustive"],
        costs=tuple(document["costs"]),
        front=tuple(document["front"]),
        final=None
        if document["final"] is None
        else FinalistRanking.model_validate(document["final"]),
        adopted=None
        if document["adopted"] is None
        else BaselineRun.model_validate(document["adopted"]),
    )
