"""The verdict of a study: a value computed from its results, and the sentences that state it.

Each arm is compared with a reference: full fine-tuning if an arm does it, else the second arm. The
sentences claim no more than the figures support: without an interval no tie and no lead is certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from sweeper.config.settings import Objective, metric_words
from sweeper.core.value import MemoryShortfall
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.text_table import capital, counted, point_words
from sweeper.reporting.verdict_doubts import (
    RangeEdge,
    VerdictDoubt,
    doubts,
    label,
    range_edges,
    reference_arm,
)


@dataclass(frozen=True)
class ArmSide:
    """An arm in the verdict: its best configuration and its costs."""

    arm: str
    label: str
    point: str
    value: float
    """The objective of its best trial, on the validation split that selected the trial."""
    base_value: float
    test_loss: float | None
    """Mean loss over the seeds on the test split, or None if the arm was not evaluated there."""
    untuned_test_loss: float | None
    forgetting: IntervalEstimate | None
    """Loss on general text minus that of its untuned base, in nats per token."""
    seeds: int
    trials: int
    trainable: float | None
    device_seconds: float
    """Device time of its search and of its finalists in seconds."""
    seconds_per_trial: float | None
    peak_memory_mib: float | None
    artifact_mib: float | None
    run_id: str | None = None
    """The MLflow run that the model was adopted from. Trials and times are then those of that run."""


@dataclass(frozen=True)
class CostRatios:
    """Costs of an arm divided by those of its reference. None where either is unknown."""

    trainable: float | None
    time: float | None
    memory: float | None
    artifact: float | None


@dataclass(frozen=True)
class ArmComparison:
    """The comparison of an arm with its reference."""

    side: ArmSide
    reference: ArmSide
    objective: Objective
    split: str
    values: tuple[float, float]
    """Values of the arm and of the reference on that split. On the test split, means over seeds."""
    difference: IntervalEstimate
    """The arm's value minus the reference's, in the metric's unit. Below zero the arm is ahead if the
    metric is minimised, and behind if it is maximised."""
    retained: IntervalEstimate | None
    """The arm's improvement over the base in % of the reference's. None if that is not positive."""
    noise: tuple[float | None, float | None]
    """Standard deviation over seeds of the arm and of the reference, None for one seed."""

    @property
    def ahead(self) -> str | None:
        """Label of the side that is ahead. None for a tie, and None without an interval."""
        # Zero within the interval is a tie: the data do not tell who is better.
        if self.difference.low is None or self.difference.has(0):
            return None
        return self.better.label

    @property
    def better(self) -> ArmSide:
        """The side with the better value, even if the difference may be chance."""
        arm_leads = self.objective.gain(self.difference.value, over=0) > 0
        return self.side if arm_leads else self.reference

    @property
    def cost_ratios(self) -> CostRatios:
        """The arm's costs over its reference's."""
        side, reference = self.side, self.reference
        return CostRatios(
            trainable=_ratio(side.trainable, reference.trainable),
            time=_ratio(side.seconds_per_trial, reference.seconds_per_trial),
            memory=_ratio(side.peak_memory_mib, reference.peak_memory_mib),
            artifact=_ratio(side.artifact_mib, reference.artifact_mib),
        )


@dataclass(frozen=True)
class Verdict:
    """The answer of a study to how its arms compare."""

    objective: Objective
    sides: tuple[ArmSide, ...]
    """One side per arm with a finished trial."""
    duels: tuple[ArmComparison, ...]
    """Each arm compared with the reference arm."""
    failed: tuple[tuple[str, str], ...]
    """Label of each arm without a finished trial, and the number of its trials by outcome."""
    doubts: tuple[VerdictDoubt, ...]
    untested: str | None = None
    """Reason why the arms are not compared on the test split."""
    misfits: tuple[tuple[str, MemoryShortfall], ...] = ()
    """Arms that were not run because their training needs more memory than the device has."""
    edges: tuple[RangeEdge, ...] = ()
    """Settings of the winners that lie at an end of what was offered."""

    @property
    def provisional(self) -> bool:
        """True if another run could still change the answer."""
        return bool(self.doubts)

    @property
    def words(self) -> str:
        """The answer in a few sentences."""
        return " ".join(_sentences(self))

    @property
    def text(self) -> str:
        """The sentences, followed by the commands that settle what is provisional."""
        commands = dict.fromkeys(f"    python -m sweeper {doubt.command}" for doubt in self.doubts)
        if not commands:
            return self.words
        return "\n".join([f"{self.words}\n\nTo settle it, run:\n", *commands])

    def document(self) -> dict[str, Any]:
        """Return figures, reasons and sentences as JSON values."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in items}

        return {
            "provisional": self.provisional,
            **asdict(self, dict_factory=plain),
            "misfits": {name: misfit.model_dump() for name, misfit in self.misfits},
            "words": self.words,
        }


def judge(results: StudyResults) -> Verdict:
    """Return the verdict on a study, finished or not.

    The verdict is PROVISIONAL if an arm's best learning rate is in the outer tenth of its range or was
    hardly searched, if an arm's budget is below the rule in conf/hydra/sweeper/study.yaml (fairness), or
    if an adopted arm was trained differently or its search is unknown.
    """
    # An arm without a finished trial has nothing to compare and is listed as failed.
    sides = {arm.name: _side(results, arm) for arm in results.arms if arm.best is not None}
    reference = reference_arm(results)
    duels = [
        _compare(results, sides[name], sides[reference.name])
        for name in sides
        if reference is not None and reference.name in sides and name != reference.name
    ]
    failed = [(label(arm), _outcomes(arm)) for arm in results.arms if arm.best is None]
    return Verdict(
        results.objective,
        tuple(sides.values()),
        tuple(duels),
        tuple(failed),
        tuple(doubts(results)),
        results.untested,
        tuple(results.misfits.items()),
        tuple(range_edges(results)),
    )


def _side(results: StudyResults, arm: ArmResult) -> ArmSide:
    best = arm.best
    assert best is not None
    assert best.value is not None
    return ArmSide(
        arm=arm.name,
        label=label(arm),
        point=_point(arm, best),
        value=best.value,
        base_value=arm.base_value,
        test_loss=None if arm.final is None else arm.final.test_loss,
        untuned_test_loss=None if arm.final is None else arm.final.untuned_test_loss,
        forgetting=results.forgotten(arm.name),
        seeds=results.seeds(arm.name),
        trials=arm.tried if arm.adopted is None else arm.adopted.trials,
        trainable=best.metric("parameters/trainable"),
        device_seconds=arm.device_seconds,
        seconds_per_trial=arm.seconds_per_trial,
        peak_memory_mib=best.metric("cost/peak_memory_mib"),
        artifact_mib=best.metric("cost/artifact_mib"),
        run_id=None if arm.adopted is None else arm.adopted.run_id,
    )


def _point(arm: ArmResult, best: TrialResult) -> str:
    if arm.adopted is not None:
        return f"adopted from MLflow run {arm.adopted.run_id}"
    return point_words(best.params)


def _compare(results: StudyResults, side: ArmSide, reference: ArmSide) -> ArmComparison:
    """Compare two arms on the test split if both were evaluated there, else on the validation split."""
    objective, found = results.objective, results.contrast(side.arm)
    # The validation split selected the winners, so the test split is preferred.
    if found is not None and found.reference == reference.arm:
        return ArmComparison(
            side=side,
            reference=reference,
            objective=objective,
            split=found.split,
            values=found.losses,
            difference=found.difference,
            retained=found.retained,
            noise=found.noise,
        )
    # Both gains count from the reference's base: a base that NF4 made worse must not flatter QLoRA.
    base = reference.base_value
    gain, reference_gain = (objective.gain(one.value, over=base) for one in (side, reference))
    return ArmComparison(
        side=side,
        reference=reference,
        objective=objective,
        split="validation",
        values=(side.value, reference.value),
        difference=IntervalEstimate(value=side.value - reference.value),
        retained=IntervalEstimate(value=100 * gain / reference_gain)
        if reference_gain > 0
        else None,
        noise=(None, None),
    )


def _outcomes(arm: ArmResult) -> str:
    causes = Counter(trial.outcome.cause for trial in arm.trials)
    return (
        ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        or "no trial has ended"
    )


def _sentences(verdict: Verdict) -> Iterator[str]:
    if verdict.doubts:
        yield "PROVISIONAL: another run could change this answer."
        yield from (f"{capital(doubt.reason)}." for doubt in verdict.doubts)
    for duel in verdict.duels:
        yield from _comparison_sentences(duel)
    if not verdict.duels:
        yield from (_single_arm_sentence(side, verdict.objective) for side in verdict.sides)
    yield from _adoption_sentences(verdict.sides)
    yield from (f"{capital(edge.reason)}." for edge in verdict.edges)
    yield from _forgetting_sentences(verdict.sides)
    if not verdict.sides:
        yield "No trial has finished, so there is nothing to compare."
    elif not verdict.duels:
        yield "There is no other arm with a finished trial to compare it with."
    for name, outcomes in verdict.failed:
        yield f"{capital(name)} has no finished trial ({outcomes})."
    for arm, misfit in verdict.misfits:
        yield f"Arm {arm} does not fit the device and was not run: {misfit}."
    yield from dict.fromkeys(_seed_sentence(duel) for duel in verdict.duels)
    if verdict.sides and verdict.untested is not None:
        yield f"Not evaluated on the test split: {verdict.untested}."


def _adoption_sentences(sides: Sequence[ArmSide]) -> Iterator[str]:
    for side in sides:
        if side.run_id is not None:
            yield (
                f"{capital(side.label)} was not trained in this study: it is MLflow run "
                f"{side.run_id}, evaluated on this study's rows. "
                f"Its search has {counted(side.trials, 'finished trial')}."
            )


def _forgetting_sentences(sides: Sequence[ArmSide]) -> Iterator[str]:
    """Yield the change of the loss on general text, which is not about the task."""
    found = [(side.label, side.forgetting) for side in sides if side.forgetting is not None]
    if found:
        each = [f"{name} {_with_interval(forgot, '{:+.4f}', '')}" for name, forgot in found]
        yield f"Forgetting (loss on general text minus the untuned base's): {', '.join(each)} nats."


def _single_arm_sentence(side: ArmSide, objective: Objective) -> str:
    gain = objective.gain(side.value, over=side.base_value)
    if gain <= 0:
        return f"The best {side.label} ({side.point}) is no better than the untuned base."
    verb = "lowers" if objective.direction == "minimize" else "raises"
    gained = (
        f"The best {side.label} ({side.point}) {verb} the untuned base's "
        f"{metric_words(objective.metric)} by {_amount(gain, '{:.3f}', objective)}"
    )
    judged = side.test_loss is not None and side.untuned_test_loss is not None
    # Only losses are measured on the test split.
    if not judged or objective.metric != "eval/loss":
        return f"{gained}."
    seeds = f"mean of {side.seeds} seeds" if side.seeds > 1 else "one seed"
    return (
        f"{gained}, and has a test loss of {side.test_loss:.4f} against the untuned base's "
        f"{side.untuned_test_loss:.4f} ({seeds})."
    )


def _comparison_sentences(duel: ArmComparison) -> Iterator[str]:
    side, reference = duel.side, duel.reference
    name = f"The best {side.label} ({side.point})"
    metric = duel.objective.metric.removeprefix("eval/")
    values = f"{duel.split} {metric} {duel.values[0]:.4f} against {duel.values[1]:.4f}"
    if duel.retained is None:
        yield (
            f"The improvement of the best {side.label} ({side.point}) cannot be given as a share of "
            f"{reference.label}'s, because {reference.label} is no better than the untuned base "
            f"({values})."
        )
    elif duel.retained.value <= 0:
        yield f"{name} is no better than the untuned base ({values})."
    else:
        share = _with_interval(duel.retained, "{:.1f}", " %")
        yield (
            f"{name} retains {share} of {reference.label}'s improvement over the untuned base "
            f"({values})."
        )
    yield _lead_sentence(duel)
    if costs := _costs(duel.cost_ratios):
        yield f"{capital(side.label)} {costs}."


def _lead_sentence(duel: ArmComparison) -> str:
    size = _amount(abs(duel.difference.value), "{:.4f}", duel.objective)
    low, high = duel.difference.low, duel.difference.high
    if low is None or high is None:
        # A leader with a shown difference of 0.0000 would look like an error.
        if f"{duel.difference.value:.4f}".lstrip("-") == "0.0000":
            return "The difference is below 0.0001, too small to name a winner without an interval."
        leader = capital(duel.better.label)
        return f"{leader} is ahead by {size}, but no confidence interval rules out a tie."
    if duel.ahead is None:
        difference = _amount(duel.difference.value, "{:+.4f}", duel.objective)
        ends = f"95 % interval {low:+.4f} to {high:+.4f}"
        return f"It is a tie: the difference of {difference} may be zero ({ends})."
    near, far = sorted((abs(low), abs(high)))  # both ends have the same sign here
    return f"{capital(duel.ahead)} is ahead by {size} (95 % interval {near:.4f} to {far:.4f})."


def _amount(value: float, form: str, objective: Objective) -> str:
    """Return a difference of the metric with its unit, if the metric has one."""
    return f"{form.format(value)} {objective.unit}".rstrip()


def _with_interval(found: IntervalEstimate, form: str, unit: str) -> str:
    value = form.format(found.value) + unit
    if found.low is None or found.high is None:
        return value
    return f"{value} (95 % interval {form.format(found.low)} to {form.format(found.high)})"


def _costs(ratios: CostRatios) -> str:
    """Return the arm's known costs as text, as shares of its reference's, or '' if none is known."""
    words = []
    if ratios.trainable is not None:
        words.append(f"trains {100 * ratios.trainable:.3g} % of the parameters")
    if ratios.time is not None:
        words.append(f"takes {ratios.time:.2g}× the time a trial")
    if ratios.memory is not None:
        words.append(f"{ratios.memory:.2g}× the peak memory")
    if ratios.artifact is not None:
        words.append(f"{ratios.artifact:.2g}× the disk space")
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + "".join(words[-1:])


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _seed_sentence(duel: ArmComparison) -> str:
    seeds = (duel.side.seeds, duel.reference.seeds)
    if duel.difference.low is None:
        return "One seed each, on the split that selected it. Small differences may be chance."
    if min(seeds) == 1:
        return (
            "With one seed in an arm, the interval covers other test examples but not other seeds."
        )
    noise = ", ".join(
        f"{sd:.4f} ({side.label})"
        for sd, side in zip(duel.noise, (duel.side, duel.reference), strict=True)
        if sd is not None
    )
    floor = f"Noise floor (standard deviation over seeds): {noise} {duel.objective.unit}".rstrip()
    return f"Seeds: {seeds[0]} against {seeds[1]}. {floor}."
