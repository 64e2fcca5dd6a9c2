"""A study replayed on recorded curves, with the product's own sampler, pruner and stop rules.

Nothing is trained. A trial gets the losses of a recorded training: the one whose rate is nearest to the
rate that the sampler asked for. Optuna stores the rate of the recorded training in place of the asked
one, so no value is interpolated. A bank has every combination of the other settings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import Trial

from benchmarks.curves.bank_points import RATE, Point
from sweeper.core.outcome import SELF_ENDED, Cause, Outcome
from sweeper.search.pruning import PruningGuard, make_pruner, make_watch, permille
from sweeper.search.samplers import make_sampler
from sweeper.search.study import ask, enqueue, first_draws, sampler_context, suggest
from sweeper.search.study_plan import StudyPlan
from sweeper.search.telling import tell
from sweeper.training.stop_rules import StopRules

LOSS = "eval/loss"
RESUME = 0.02
"""Trial-equivalents that continuing a paused trial costs: assumed, not measured."""


@dataclass(frozen=True)
class RecordedCurve:
    """A complete training, with costs in trial-equivalents: one training and one whole judgement."""

    point: Point
    looks: Mapping[int, float]
    """Loss on the rows of a look, by step. NaN where the training has diverged."""
    whole: Mapping[int, float]
    """Loss on the whole validation split, by step."""
    steps: int
    """Steps that were trained: fewer than the schedule has if the training diverged."""
    diverged: bool = False
    first_loss: float = 1.0
    """Training loss of the first step."""
    train_cost: float = 1.0
    """Cost of the whole schedule without looks."""
    look_cost: float = 0.0
    judge_cost: float = 0.0
    """Cost of a judgement of the whole split."""

    def value(self, steps: int | None = None) -> float:
        """Return the loss of the checkpoint that looks would keep after so many steps, or infinity.

        A training that diverges has no value at its end.
        """
        if self.diverged and steps is None:
            return math.inf
        found = [
            (loss, step)
            for step, loss in self.looks.items()
            if math.isfinite(loss) and (steps is None or step <= steps)
        ]
        return self.whole[min(found)[1]] if found else math.inf


def recorded_curves(
    header: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> list[RecordedCurve]:
    """Return the curves of a bank's trainings, with costs relative to the bank's median training."""
    looked = [_look_seconds(trial) for trial in trials]
    judging = statistics.median(seconds for seconds in looked if seconds is not None)
    unit = judging + statistics.median(
        trial["cpu_train"] for trial in trials if trial["steps"] == header["total_steps"]
    )
    share = len(header["look_rows"]) / len(header["tokens"])
    return [
        RecordedCurve(
            point=trial["point"],
            looks={look["step"]: _number(look["sample_loss"]) for look in trial["looks"]},
            whole={look["step"]: _number(look["loss"]) for look in trial["looks"]},
            steps=trial["steps"],
            diverged=trial["cause"] == "diverged",
            first_loss=_number(next(iter(trial["train_loss"]), None)),
            # of a training that diverged the rest of the schedule is not known, and never paid for
            train_cost=trial["cpu_train"] * header["total_steps"] / max(1, trial["steps"]) / unit,
            look_cost=(seconds or judging) * share / unit,
            judge_cost=(seconds or judging) / unit,
        )
        for trial, seconds in zip(trials, looked, strict=True)
    ]


def _look_seconds(trial: Mapping[str, Any]) -> float | None:
    """Return the median CPU seconds of a training's looks, or None if it had none."""
    seconds = [look["cpu"] for look in trial["looks"] if look["cpu"] is not None]
    return statistics.median(seconds) if seconds else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


@dataclass(frozen=True)
class CurveTable:
    """The curves that a replay may use."""

    curves: Sequence[RecordedCurve]
    total_steps: int

    def __post_init__(self) -> None:
        """Refuse a table in which a combination of the other settings has no curve."""
        levels = self.levels()
        wanted = math.prod(len(values) for key, values in levels.items() if key != RATE)
        found = {_others(curve.point) for curve in self.curves}
        if len(found) < wanted:
            raise ValueError(
                f"the bank has curves for {len(found)} of {wanted} combinations of its ranks, alphas "
                "and target modules. Train more of its points first"
            )

    def levels(self) -> dict[str, list[Any]]:
        """Return the values of each setting, numbers in ascending order."""
        found: dict[str, list[Any]] = {}
        for curve in self.curves:
            for key, value in curve.point.items():
                found.setdefault(key, [])
                if value not in found[key]:
                    found[key].append(value)
        return {key: _ordered(values) for key, values in found.items()}

    def nearest(self, asked: Point, tried: set[int]) -> int:
        """Return the index of the curve with the nearest rate, if possible one that is not tried."""
        key = _others(asked)
        there = [index for index, curve in enumerate(self.curves) if _others(curve.point) == key]
        rate = math.log(float(asked[RATE]))

        def distance(index: int) -> tuple[bool, float]:
            return index in tried, abs(math.log(float(self.curves[index].point[RATE])) - rate)

        return min(there, key=distance)


def _others(point: Point) -> tuple[tuple[str, float | int | str], ...]:
    return tuple(sorted((key, value) for key, value in point.items() if key != RATE))


def _ordered(values: list[Any]) -> list[Any]:
    return sorted(values) if all(isinstance(value, int | float) for value in values) else values


@dataclass
class AskedTrial:
    """A trial that the sampler asked for, and how far its curve has been followed."""

    trial: Trial
    curve: RecordedCurve
    index: int
    rules: StopRules
    guard: PruningGuard
    at: int = 0
    """Steps so far."""


@dataclass(frozen=True)
class EndedTrial:
    """A trial that has ended."""

    spent: float
    """Trial-equivalents that the study had spent by then."""
    index: int
    """Index of its curve."""
    cause: Cause
    value: float
    """Loss of the checkpoint that looks would keep. Optuna gets it if the trial ran to its own end."""


GuardMaker = Callable[["ReplayedStudy", Trial], PruningGuard]


def product_guard(study: ReplayedStudy, trial: Trial) -> PruningGuard:
    """Return the product's guard of a trial, with the pruner of the study's plan."""
    return make_watch(study.plan.study.pruner, study.training, trial)


@dataclass
class ReplayedStudy:
    """One study of a policy. Its plan decides sampler, start-up, known points, pruner and patience."""

    plan: StudyPlan
    table: CurveTable
    seed: int
    guard_of: GuardMaker = product_guard
    spent: float = 0.0
    """Trial-equivalents so far."""
    ended: list[EndedTrial] = field(default_factory=list)
    best_looks: dict[int, float] = field(default_factory=dict)
    """Best look of all trials so far by step, for guards that compare with it."""

    def __post_init__(self) -> None:
        """Open an Optuna study in memory, with the plan's known points queued."""
        self.arm = self.plan.arms[0]
        self.training = self.arm.settings.training
        sampler = self.arm.sampler.model_copy(update={"seed": self.seed})
        context = sampler_context(self.plan, self.arm)
        self.optuna = optuna.create_study(
            direction="minimize",
            sampler=make_sampler(sampler, self.arm.space, self.arm.n_trials, context),
            pruner=make_pruner(self.plan.study.pruner),
        )
        self.tried: set[int] = set()
        # stands for the untuned base's value, which Optuna gets for an infeasible trial
        self.base_value = statistics.median(curve.first_loss for curve in self.table.curves)
        levels = self.table.levels()
        self.fixed = {key: values[0] for key, values in levels.items() if len(values) == 1}
        enqueue(self.optuna, first_draws(self.arm))

    def ask(self) -> AskedTrial:
        """Ask the product's sampler for a trial, and find its curve."""
        trial = ask(self.optuna)
        point = suggest(trial, self.arm.space)
        index = self.table.nearest({**self.fixed, **point}, self.tried)
        self.tried.add(index)
        curve = self.table.curves[index]
        if RATE in point:
            self._replace_rate(trial, float(curve.point[RATE]))
            point = {**point, RATE: curve.point[RATE]}
        trial.set_user_attr("point", point)
        rules = StopRules(self.training, self.plan.objective, self.table.total_steps)
        rules.add_training_step(1, {"train/loss": curve.first_loss})
        return AskedTrial(trial, curve, index, rules, self.guard_of(self, trial))

    def advance(self, asked: AskedTrial, until: int) -> Cause | None:
        """Follow a curve up to a step. Return why the trial ends there, or None if it does not."""
        total, curve = self.table.total_steps, asked.curve
        for step, loss in curve.looks.items():
            if not asked.at < step <= until:
                continue
            self.spent += curve.train_cost * (step - asked.at) / total + curve.look_cost
            asked.at = step
            if cause := self._after_look(asked, step, loss):
                return cause
        if curve.diverged and until > curve.steps:
            self.spent += curve.train_cost * max(0, curve.steps - asked.at) / total
            asked.at = max(asked.at, curve.steps)
            return "diverged"
        return "finished" if asked.at >= total else None

    def end(self, asked: AskedTrial, cause: Cause) -> None:
        """Record in Optuna how a trial ended, as the product does."""
        value = asked.curve.value(asked.at)
        if cause in SELF_ENDED:
            self.spent += asked.curve.judge_cost
        outcome = Outcome(
            cause=cause,
            best_value=value if math.isfinite(value) else None,
            best_step=asked.at,
            steps=asked.at,
        )
        tell(self.optuna, asked.trial, outcome, self.base_value)
        self.ended.append(EndedTrial(self.spent, asked.index, cause, value))

    def _after_look(self, asked: AskedTrial, step: int, loss: float) -> Cause | None:
        total = self.table.total_steps
        asked.rules.add_evaluation(step, {LOSS: loss})
        if asked.rules.diverged:
            return "diverged"
        hopeless = asked.guard.evaluated(step, total, loss)
        self.best_looks[step] = min(loss, self.best_looks.get(step, math.inf))
        if step >= total:
            return None
        if hopeless:
            return "pruned"
        return "early_stopped" if asked.rules.stop else None

    def _replace_rate(self, trial: Trial, rate: float) -> None:
        """Store the rate of the recorded training in place of the one that was asked."""
        domain: BaseDistribution = trial.distributions[RATE]
        storage = self.optuna._storage
        storage.set_trial_param(trial._trial_id, RATE, domain.to_internal_repr(rate), domain)


@dataclass
class GapGuard:
    """A guard that stops a trial whose look is worse than the best look at the same step by a gap."""

    study: ReplayedStudy
    trial: Trial
    gap: float
    at: int = 250
    """Per-mille of the schedule at which the guard decides."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See PruningGuard."""
        here = permille(step, total_steps)
        self.trial.report(value, here)
        return here == self.at and value > self.study.best_looks.get(step, math.inf) + self.gap


def run_in_turn(study: ReplayedStudy, budget: float) -> None:
    """Run one trial after the other until the budget is spent."""
    while study.spent < budget:
        asked = study.ask()
        cause = study.advance(asked, study.table.total_steps)
        assert cause is not None, f"the curve of {asked.curve.point} has no end"
        study.end(asked, cause)


def run_halving(
    study: ReplayedStudy,
    budget: float,
    bracket: int = 8,
    rungs: Sequence[float] = (0.25, 0.5),
) -> None:
    """Run brackets of trials that pause at rungs, where the better half continues."""
    while study.spent < budget:
        alive = [study.ask() for _ in range(bracket)]
        for rung in rungs:
            alive = _half(study, alive, round(rung * study.table.total_steps))
        for asked in alive:
            study.spent += RESUME
            cause = study.advance(asked, study.table.total_steps)
            assert cause is not None, f"the curve of {asked.curve.point} has no end"
            study.end(asked, cause)


def _half(study: ReplayedStudy, alive: Sequence[AskedTrial], step: int) -> list[AskedTrial]:
    """Advance trials to a rung, end the worse half, and return the others."""
    there: list[AskedTrial] = []
    for asked in alive:
        study.spent += RESUME if asked.at else 0.0
        if cause := study.advance(asked, step):
            study.end(asked, cause)
        else:
            there.append(asked)
    there.sort(key=lambda asked: asked.curve.looks[step])
    kept = max(1, round(len(there) / 2))
    for asked in there[kept:]:
        study.end(asked, "pruned")
    return there[:kept]
