"""The verdict: what the numbers carry, as a value, and the words made of it.

Each arm is held against a reference: full fine-tuning where there is such an arm, else the next one.
Knows only results; draws nothing.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from sweeper.config.settings import Objective, metric_words
from sweeper.core.value import MemoryShortfall
from sweeper.reporting.baseline_doubts import OUTER, RATE, place_in_range, strangeness
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.results import ArmResult, SearchedRange, StudyResults, TrialResult
from sweeper.reporting.text_table import capital, counted, point_words

FULL = "full fine-tuning"
HALF_DECADE = 10**0.5


@dataclass(frozen=True)
class ArmSide:
    """An arm in the verdict: its best configuration, and what it costs."""

    arm: str
    label: str
    point: str
    value: float
    """Of its best trial by the objective, on the validation split that chose it."""
    base_value: float
    test_loss: float | None
    """Mean over the seeds on the test split, if it was judged there."""
    untuned_test_loss: float | None
    forgetting: IntervalEstimate | None
    """How much worse than its untuned base it is on general text, in nats per token."""
    seeds: int
    trials: int
    trainable: float | None
    device_seconds: float
    """Worker time of all its trials."""
    seconds_per_trial: float | None
    peak_memory_mib: float | None
    artifact_mib: float | None
    run_id: str | None = None
    """The MLflow run it was adopted from; trials and times are then of that run and its search."""


@dataclass(frozen=True)
class CostRatios:
    """What an arm takes, divided by what its reference takes; None where either is unknown."""

    trainable: float | None
    time: float | None
    memory: float | None
    artifact: float | None


@dataclass(frozen=True)
class ArmComparison:
    """An arm against its reference."""

    side: ArmSide
    reference: ArmSide
    objective: Objective
    split: str
    values: tuple[float, float]
    """Of the arm and of the reference on that split; means over seeds on the test split."""
    difference: IntervalEstimate
    """Value minus the reference's value, in the metric's unit: below zero, the arm is ahead if the
    metric is minimised, and behind if it is maximised."""
    retained: IntervalEstimate | None
    """Improvement over the untuned base in % of the reference's; None if that has none."""
    noise: tuple[float | None, float | None]

    @property
    def ahead(self) -> str | None:
        """Who is ahead, by label; None for a tie, or where there is no interval to tell a tie by."""
        if self.difference.low is None or self.difference.has(0):
            return None
        return self.better.label

    @property
    def better(self) -> ArmSide:
        """Whose value is better, be it by chance."""
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
class VerdictDoubt:
    """Why the verdict is provisional, and the command that settles it."""

    arm: str
    reason: str
    command: str


@dataclass(frozen=True)
class Verdict:
    """The answer of a study."""

    objective: Objective
    sides: tuple[ArmSide, ...]
    """The arms with a finished trial."""
    duels: tuple[ArmComparison, ...]
    failed: tuple[tuple[str, str], ...]
    """Label of each arm without a finished trial, and how its trials ended."""
    doubts: tuple[VerdictDoubt, ...]
    untested: str | None = None
    """Why the arms are not compared on the test split."""
    misfits: tuple[tuple[str, MemoryShortfall], ...] = ()
    """Arms that were not run because their trainings are larger than the device."""

    @property
    def provisional(self) -> bool:
        """Whether a command is still to be run before the answer holds."""
        return bool(self.doubts)

    @property
    def words(self) -> str:
        """The answer in a few sentences."""
        return " ".join(_sentences(self))

    @property
    def text(self) -> str:
        """The words, and under them the commands that settle what is provisional."""
        commands = dict.fromkeys(f"    python -m sweeper {doubt.command}" for doubt in self.doubts)
        return "\n\n".join(part for part in (self.words, "\n".join(commands)) if part)

    def document(self) -> dict[str, Any]:
        """Figures, reasons and words as JSON values."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in items}

        return {
            "provisional": self.provisional,
            **asdict(self, dict_factory=plain),
            "misfits": {name: misfit.model_dump() for name, misfit in self.misfits},
            "words": self.words,
        }


def judge(results: StudyResults) -> Verdict:
    """The verdict on a study as far as it has come.

    PROVISIONAL is its first word while an arm's best learning rate lies in the outer tenth of its
    range, while an arm's budget lies below the rule (conf/hydra/sweeper/study.yaml, fairness), or while
    an adopted arm was trained on something else or otherwise, or nobody knows how it was searched.
    """
    sides = {arm.name: _side(results, arm) for arm in results.arms if arm.best is not None}
    reference = reference_arm(results)
    duels = [
        _duel(results, sides[name], sides[reference.name])
        for name in sides
        if reference is not None and reference.name in sides and name != reference.name
    ]
    failed = [(label(arm), _endings(arm)) for arm in results.arms if arm.best is None]
    doubts = [*_edges(results), *_budgets(results), *_adoptions(results)] if sides else []
    return Verdict(
        results.objective,
        tuple(sides.values()),
        tuple(duels),
        tuple(failed),
        tuple(doubts),
        results.untested,
        tuple(results.misfits.items()),
    )


def label(arm: ArmResult) -> str:
    """The method, and the arm's name, or the run it was adopted from, where that says more."""
    if arm.adopted is not None:
        return f"{arm.method} (run {arm.adopted.short})"
    return arm.method if arm.name in ("lora", "full") else f"{arm.method} ({arm.name})"


def with_override(command: str, key: str, value: str) -> str:
    """A command with one override set, before its -m."""
    words = [word for word in shlex.split(command) if not word.startswith(f"{key}=")]
    return shlex.join([*words[:-1], f"{key}={value}", words[-1]])


def renamed(results: StudyResults, suffix: str) -> str:
    """The study's command with a suffix on the study's name, for a search of other settings."""
    name = f"{results.study_name}_{suffix}"
    return with_override(results.command, "hydra.sweeper.study_name", name)


def searched_otherwise(
    results: StudyResults, arm: ArmResult, suffix: str, key: str, words: str
) -> str:
    """The study's command under a new name, with one key of an arm given or searched otherwise.

    A key of `training` that the arm does not search is set for every arm: with different schedules the
    arms would no longer be compared fairly.
    """
    command = renamed(results, suffix)
    for_all = key.startswith("training.") and key not in arm.ranges
    if arm.name == "lora" or for_all:
        return with_override(command, key, words)
    return with_override(command, f"hydra.sweeper.arms.{arm.name}.params", f'{{{key}: "{words}"}}')


def reference_arm(results: StudyResults) -> ArmResult | None:
    """Full fine-tuning if an arm did it, else the second arm with a result, if there is one."""
    compared = [arm for arm in results.arms if arm.best is not None]
    full = [arm for arm in compared if arm.method == FULL]
    return next(iter(full or compared[1:]), None)


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
        device_seconds=arm.seconds,
        seconds_per_trial=arm.seconds_per_trial,
        peak_memory_mib=best.metric("cost/peak_memory_mib"),
        artifact_mib=best.metric("cost/artifact_mib"),
        run_id=None if arm.adopted is None else arm.adopted.run_id,
    )


def _point(arm: ArmResult, best: TrialResult) -> str:
    if arm.adopted is not None:
        return f"adopted from MLflow run {arm.adopted.run_id}"
    return point_words(best.point)


def _duel(results: StudyResults, side: ArmSide, reference: ArmSide) -> ArmComparison:
    """On the test split if both were judged on it against each other, else on the validation split."""
    objective, found = results.objective, results.contrast(side.arm)
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
    base = reference.base_value  # one zero line for both: the base as the reference finds it
    gain, whole = (objective.gain(one.value, over=base) for one in (side, reference))
    return ArmComparison(
        side=side,
        reference=reference,
        objective=objective,
        split="validation",
        values=(side.value, reference.value),
        difference=IntervalEstimate(value=side.value - reference.value),
        retained=IntervalEstimate(value=100 * gain / whole) if whole > 0 else None,
        noise=(None, None),
    )


def _endings(arm: ArmResult) -> str:
    causes = Counter(trial.outcome.cause for trial in arm.trials)
    return ", ".join(f"{count} {cause}" for cause, count in causes.most_common()) or "none ended"


def _edges(results: StudyResults) -> Iterator[VerdictDoubt]:
    """Arms whose best rate lies in the outer tenth (log) of its range."""
    for arm in results.arms:
        found = arm.ranges.get(RATE)
        if arm.best is None or found is None:
            continue
        rate = float(arm.setting(RATE))
        low, high = found.values[0], found.values[-1]
        place = place_in_range(rate, low, high)
        if OUTER <= place <= 1 - OUTER:
            continue
        reason = (
            f"the best learning rate of {label(arm)} ({rate:.3g}) lies in the outer tenth of its "
            f"range ({low:.3g} to {high:.3g})"
        )
        words = wider(found, downwards=place < OUTER)
        yield VerdictDoubt(arm.name, reason, searched_otherwise(results, arm, "wider", RATE, words))


def wider(found: SearchedRange, downwards: bool) -> str:
    """The search-space words for a range that goes a decade further at one end."""
    low, high = found.values[0], found.values[-1]
    if found.continuous:
        ends = (low / 10, high) if downwards else (low, high * 10)
        return f"tag(log, interval({ends[0]:.3g}, {ends[1]:.3g}))"
    more = [high * HALF_DECADE, high * 10]
    if downwards:
        more = [low / 10, low / HALF_DECADE]
    values = sorted({float(f"{value:.3g}") for value in (*found.values, *more)})
    return f"choice({', '.join(f'{value:.3g}' for value in values)})"


def _budgets(results: StudyResults) -> Iterator[VerdictDoubt]:
    """Arms with too few finished trials, or with a smaller budget than the largest.

    A grid that was walked to its end lacks no budget, and an arm that only failed needs another space.
    """
    rule = results.fairness
    searched = [arm for arm in results.arms if arm.adopted is None]
    if not searched:
        return
    largest = max(searched, key=lambda arm: _spent(arm, rule.equal))
    for arm in searched:
        if arm.tried >= arm.wanted and (arm.exhaustive or arm.best is None):
            continue  # nothing new to try, or nothing that more trials would mend
        spent, most = _spent(arm, rule.equal), _spent(largest, rule.equal)
        if arm.finished < rule.min_finished:
            factor = rule.min_finished / max(arm.finished, 1)
            reason = (
                f"{label(arm)} has {counted(arm.finished, 'finished trial')}, fewer than "
                f"fairness.min_finished={rule.min_finished}"
            )
        elif spent < (1 - rule.tolerance) * most:
            factor = most / spent if spent else 2.0
            unit = rule.equal.replace("_", "-").removesuffix("s")
            reason = (
                f"{label(arm)} was searched with {counted(spent, unit)} against {most:,.0f} of "
                f"{label(largest)}"
            )
        else:
            continue
        yield VerdictDoubt(arm.name, reason, _extended(results, arm, factor))


def _adoptions(results: StudyResults) -> Iterator[VerdictDoubt]:
    """What keeps an adopted model from being a fair baseline; training one's own settles it."""
    command = with_override(
        renamed(results, "own_baseline"), "hydra.sweeper.baseline.run_id", "null"
    )
    for arm in results.arms:
        if arm.best is not None:
            for reason in strangeness(arm, results.fairness):
                yield VerdictDoubt(arm.name, f"{label(arm)} {reason}", command)


def _spent(arm: ArmResult, unit: str) -> float:
    return {"trials": arm.tried, "tokens": arm.tokens, "device_seconds": arm.seconds}[unit]


def _extended(results: StudyResults, arm: ArmResult, factor: float) -> str:
    """The study's command with as many more trials for an arm, never fewer than one more."""
    count = max(math.ceil(arm.wanted * factor), arm.wanted + 1)
    if arm.tried < arm.wanted:
        count = max(arm.wanted, math.ceil(arm.tried * factor))  # it has not even had its own
    where = "hydra.sweeper" if arm.name == "lora" else f"hydra.sweeper.arms.{arm.name}"
    return with_override(results.command, f"{where}.n_trials", str(count))


def _sentences(verdict: Verdict) -> Iterator[str]:
    if verdict.doubts:
        yield f"PROVISIONAL: {'; '.join(doubt.reason for doubt in verdict.doubts)}."
    for duel in verdict.duels:
        yield from _duel_words(duel)
    if not verdict.duels:
        yield from (_alone(side, verdict.objective) for side in verdict.sides)
    yield from _adoption_words(verdict.sides)
    yield from _forgetting_words(verdict.sides)
    if not verdict.sides:
        yield "No trial has finished, so there is nothing to compare."
    elif not verdict.duels:
        yield "There is no other arm with a finished trial to compare it with."
    for name, endings in verdict.failed:
        yield f"{capital(name)} has no finished trial ({endings})."
    for arm, misfit in verdict.misfits:
        yield f"Arm {arm} did not fit and was not run: {misfit}."
    yield from dict.fromkeys(_seed_words(duel) for duel in verdict.duels)
    if verdict.sides and verdict.untested is not None:
        yield f"Not judged on the test split: {verdict.untested}."


def _adoption_words(sides: Sequence[ArmSide]) -> Iterator[str]:
    for side in sides:
        if side.run_id is not None:
            yield (
                f"{capital(side.label)} was not trained here: it is MLflow run {side.run_id}, judged "
                f"anew on this study's rows, of a search of {side.trials} finished trials."
            )


def _forgetting_words(sides: Sequence[ArmSide]) -> Iterator[str]:
    """What tuning did to the loss on text that is not about the task."""
    found = [(side.label, side.forgetting) for side in sides if side.forgetting is not None]
    if found:
        each = [f"{name} {_with_interval(forgot, '{:+.4f}', '')}" for name, forgot in found]
        yield f"Forgetting (loss on general text against the untuned base): {', '.join(each)} nats."


def _alone(side: ArmSide, objective: Objective) -> str:
    gain = objective.gain(side.value, over=side.base_value)
    if gain <= 0:
        return f"The best {side.label} ({side.point}) is no better than the untuned base."
    verb = "lowers" if objective.direction == "minimize" else "raises"
    gained = (
        f"The best {side.label} ({side.point}) {verb} the {metric_words(objective.metric)} by "
        f"{_amount(gain, '{:.3f}', objective)}"
    )
    judged = side.test_loss is not None and side.untuned_test_loss is not None
    if (
        not judged or objective.metric != "eval/loss"
    ):  # what is judged on the test split is the loss
        return f"{gained}."
    seeds = f"mean of {side.seeds} seeds" if side.seeds > 1 else "one seed"
    return (
        f"{gained}, and has a test loss of {side.test_loss:.4f} against the untuned base's "
        f"{side.untuned_test_loss:.4f} ({seeds})."
    )


def _duel_words(duel: ArmComparison) -> Iterator[str]:
    side, reference = duel.side, duel.reference
    name = f"The best {side.label} ({side.point})"
    metric = duel.objective.metric.removeprefix("eval/")
    values = f"{duel.split} {metric} {duel.values[0]:.4f} against {duel.values[1]:.4f}"
    if duel.retained is None:
        yield (
            f"{name} cannot be measured by {reference.label}, which does not improve on the base "
            f"at all ({values})."
        )
    elif duel.retained.value <= 0:
        yield f"{name} is no better than the untuned base ({values})."
    else:
        share = _with_interval(duel.retained, "{:.1f}", " %")
        yield f"{name} retains {share} of {reference.label}'s improvement over the base ({values})."
    yield _who_is_ahead(duel)
    if costs := _costs(duel.cost_ratios):
        yield f"{capital(side.label)} {costs}."


def _who_is_ahead(duel: ArmComparison) -> str:
    size = _amount(abs(duel.difference.value), "{:.4f}", duel.objective)
    low, high = duel.difference.low, duel.difference.high
    if low is None or high is None:
        if f"{duel.difference.value:.4f}".lstrip("-") == "0.0000":
            return "The difference is below 0.0001, with no interval to tell whose it is."
        leader = capital(duel.better.label)
        return f"{leader} is ahead by {size}, with no interval to tell it from a tie."
    if duel.ahead is None:
        difference = _amount(duel.difference.value, "{:+.4f}", duel.objective)
        ends = f"95 % interval {low:+.4f} to {high:+.4f}"
        return f"It is a tie: the difference of {difference} may be zero ({ends})."
    near, far = sorted((abs(low), abs(high)))  # it does not reach zero
    return f"{capital(duel.ahead)} is ahead by {size} (95 % interval {near:.4f} to {far:.4f})."


def _amount(value: float, form: str, objective: Objective) -> str:
    """A difference of the metric, with its unit if it has one."""
    return f"{form.format(value)} {objective.unit}".rstrip()


def _with_interval(found: IntervalEstimate, form: str, unit: str) -> str:
    value = form.format(found.value) + unit
    if found.low is None or found.high is None:
        return value
    return f"{value} (95 % interval {form.format(found.low)} to {form.format(found.high)})"


def _costs(ratios: CostRatios) -> str:
    """The known costs of an arm in words, as shares of its reference's; "" if none is known."""
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


def _seed_words(duel: ArmComparison) -> str:
    seeds = (duel.side.seeds, duel.reference.seeds)
    if duel.difference.low is None:
        return "One seed each, on the split that chose them: small differences may be chance."
    if min(seeds) == 1:
        return (
            "An arm with one seed: the interval holds for other test examples, not for other seeds."
        )
    noise = ", ".join(
        f"{sd:.4f} ({side.label})"
        for sd, side in zip(duel.noise, (duel.side, duel.reference), strict=True)
        if sd is not None
    )
    floor = f"noise floor (sd over seeds) {noise} {duel.objective.unit}".rstrip()
    return f"Seeds: {seeds[0]} against {seeds[1]}; {floor}."
