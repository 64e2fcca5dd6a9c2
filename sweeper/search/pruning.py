"""When a trial may be stopped: Optuna's pruner behind a guard that knows the schedule.

The step told to Optuna is the per-mille of the trial's own schedule, and the guarded pruners see fixed
rungs of it only, so that trials are compared at the same fraction of the schedule even when its
length is searched. Which evaluations a trial makes does not matter: its best value so far is
interpolated between the two evaluations around a rung.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Protocol

import optuna
from optuna.pruners import BasePruner, NopPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.study import StudyDirection
from optuna.trial import Trial

from sweeper.config.settings import Objective, PrunerSettings, TrainingSettings
from sweeper.search.samplers import make_by_class_name

WHOLE = 1000
"""The whole schedule in per-mille."""


class PruningGuard(Protocol):
    """Watches one attempt of a trial."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """Take note of an evaluation after `step` of `total_steps` optimiser steps.

        Returns:
            Whether the trial should be stopped.
        """


def make_pruner(settings: PrunerSettings) -> BasePruner:
    """Optuna's pruner; when its answer counts is decided by a watch.

    Raises:
        ConfigError: Optuna has no such class, or it does not take these arguments.
    """
    enough = settings.n_startup_trials
    match settings.name:
        case "none":
            return NopPruner()
        case "median" | "percentile":
            percentile = settings.percentile or 50.0
            return PercentilePruner(percentile, enough, n_min_trials=max(1, enough))
        case "successive_halving":
            assert settings.reduction_factor is not None
            return SuccessiveHalvingPruner(settings.rungs[0], settings.reduction_factor)
        case "optuna":
            assert settings.class_name is not None
            arguments = dict(settings.kwargs)
            made = make_by_class_name(optuna.pruners, settings.class_name, arguments, "pruner")
            assert isinstance(made, BasePruner)
            return made


def make_watch(
    settings: PrunerSettings,
    training: TrainingSettings,
    trial: Trial,
    reported: Iterable[int] = (),
    measured: Sequence[tuple[int, float]] = (),
) -> PruningGuard:
    """The watch over a trial.

    Args:
        settings: which pruner decides, and where.
        training: its warm-up decides nothing.
        trial: what is watched.
        reported: the steps that an earlier attempt told Optuna.
        measured: what earlier attempts measured, as Optuna is told of it, by optimiser step.
    """
    if len(trial.study.directions) > 1:
        return NullGuard()  # Optuna has no intermediate values of several objectives
    if settings.rungs:
        return ContinuedTrial(RungGuard(settings, training, trial, reported), measured)
    return ContinuedTrial(OpenGuard(trial, reported), measured)


def as_told(objective: Objective, value: float) -> float:
    """What Optuna is told of a value of the metric that pruning goes by.

    An Optuna study has one direction, for intermediate values as for final ones. Where the objective
    is better the other way (ROUGE is maximised and pruned by a loss), the value is negated: higher is
    then better for both, and rungs, medians and the best so far need no second rule.
    """
    return value if objective.pruning_direction == objective.direction else -value


class NullGuard:
    """Tells Optuna nothing and stops nobody."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See Watch."""
        return False


class ContinuedTrial:
    """What earlier attempts measured is noted before the first evaluation, and decides nothing.

    Otherwise a trial whose best came before an interruption would be compared by what came after it.
    """

    def __init__(self, watch: PruningGuard, measured: Sequence[tuple[int, float]]) -> None:
        self._watch = watch
        self._measured = measured

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See Watch."""
        for earlier, then in self._measured:
            if earlier < step:  # what lies beyond the checkpoint is measured again
                self._watch.evaluated(earlier, total_steps, then)
        self._measured = ()
        return self._watch.evaluated(step, total_steps, value)


class OpenGuard:
    """Every evaluation is told to Optuna, and its pruner decides alone."""

    def __init__(self, trial: Trial, reported: Iterable[int]) -> None:
        self._trial = trial
        self._reported = set(reported)

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See Watch."""
        at = permille(step, total_steps)
        if at in self._reported:
            return False
        self._reported.add(at)
        self._trial.report(value, at)
        return self._trial.should_prune() and step < total_steps


class RungGuard:
    """The pruner is asked at every rung, and heard where the guard allows a decision.

    An evaluation may pass several rungs at once. Only the newest decides: who has caught up since an
    older one is not stopped for it.
    """

    def __init__(
        self,
        settings: PrunerSettings,
        training: TrainingSettings,
        trial: Trial,
        reported: Iterable[int],
    ) -> None:
        self._settings = settings
        self._training = training
        self._trial = trial
        self._reported = set(reported)
        self._last: tuple[float, float] | None = None
        """Where in the schedule the last evaluation was, and the best value until then."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See Watch."""
        here = (WHOLE * step / total_steps, self._best(value))
        verdicts = [
            self._ask(rung, at)
            and may_prune(self._training, rung, step, total_steps)
            and self._enough(rung)
            for rung in self._settings.rungs
            if (at := value_at(rung, self._last, here)) is not None
        ]
        self._last = here
        return bool(verdicts) and verdicts[-1]

    def _best(self, value: float) -> float:
        if self._last is None:
            return value
        maximize = self._trial.study.direction is StudyDirection.MAXIMIZE
        return max(value, self._last[1]) if maximize else min(value, self._last[1])

    def _ask(self, rung: int, value: float) -> bool:
        """Always asked, even when nobody listens: successive halving takes note by being asked."""
        if rung in self._reported:
            return False
        self._reported.add(rung)
        self._trial.report(value, rung)
        return self._trial.should_prune()

    def _enough(self, rung: int) -> bool:
        """Whether enough other trials have passed this rung."""
        trials = self._trial.study.get_trials(deepcopy=False)
        there = sum(rung in other.intermediate_values for other in trials) - 1
        return there >= self._settings.n_startup_trials


def permille(step: int, total_steps: int) -> int:
    """The fraction of the schedule that Optuna sees as a step."""
    return round(WHOLE * step / total_steps)


def value_at(
    rung: int, before: tuple[float, float] | None, here: tuple[float, float]
) -> float | None:
    """The value at a rung on the straight line between two evaluations (per-mille, value).

    None if the rung is not between them; without an earlier evaluation only `here` itself counts.
    """
    place, value = here
    if abs(place - rung) < 0.5:
        return value
    if before is None or not before[0] + 0.5 <= rung < place:
        return None
    return before[1] + (value - before[1]) * (rung - before[0]) / (place - before[0])


def may_prune(training: TrainingSettings, rung: int, step: int, total_steps: int) -> bool:
    """Whether a decision is allowed at all: at a rung after warm-up, and before the end."""
    warmup = training.warmup_length(total_steps)
    return rung * total_steps > WHOLE * warmup and step < total_steps


def audited(settings: PrunerSettings, seed: int, trial_key: str) -> bool:
    """Whether a trial that should be stopped goes on, to find out whether that had been wrong.

    Drawn from the trial's name, so that a resumed study decides the same.
    """
    return random.Random(f"{seed}/{trial_key}").random() < settings.audit_fraction
