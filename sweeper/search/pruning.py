"""Pruners that respect a trial's schedule.

The step reported to Optuna is the per-mille of the trial's own schedule. Guarded pruners are asked
at fixed rungs of that schedule only, so trials are compared at the same fraction of their training
even when its length is searched. A trial need not be evaluated exactly at a rung: its best value so
far is interpolated linearly between the evaluations before and after the rung.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.pruners import BasePruner, NopPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial

from sweeper.config.settings import Objective, PrunerSettings, TrainingSettings
from sweeper.core.errors import ConfigError
from sweeper.search.gap_pruner import GapPruner
from sweeper.search.samplers import make_by_class_name

WHOLE = 1000
"""The whole schedule in per-mille."""
NEAR = 0.05
"""Largest distance of a look from a rung at which it counts as at the rung, as a share of the rung.

Looks are rounded to steps: an eighth of 100 steps is 12, so the looks are at 24 % and 36 %.
"""

COMPLETED_RUNG = "completed_rung_"
"""Start of the system attributes in which Optuna's successive halving stores the rungs of a trial."""


class PruningGuard(Protocol):
    """Decides for one attempt of a trial whether the pruner may stop it."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """Record an evaluation and report it to Optuna.

        Args:
            step: optimizer steps done so far, out of `total_steps`.
            value: the metric that pruning goes by, with the objective's sign.

        Returns:
            True if the trial should be stopped.
        """


def make_pruner(settings: PrunerSettings) -> BasePruner:
    """Return the configured Optuna pruner. A PruningGuard decides when its answer counts.

    Raises:
        ConfigError: Optuna has no such class, or the class does not take these arguments.
    """
    enough = settings.n_startup_trials
    match settings.name:
        case "none":
            return NopPruner()
        case "median" | "percentile":
            # n_min_trials follows n_startup_trials: with Optuna's default of 1, the second trial
            # at a rung would be compared with a single one.
            percentile = settings.percentile or 50.0
            return PercentilePruner(percentile, enough, n_min_trials=max(1, enough))
        case "gap":
            return _make_gap(enough, settings.kwargs)
        case "successive_halving":
            assert settings.reduction_factor is not None
            # The first rung is given explicitly. Optuna's "auto" derives it from the first
            # report, which then passes several rungs at once.
            return SuccessiveHalvingPruner(settings.rungs[0], settings.reduction_factor)
        case "optuna":
            assert settings.class_name is not None
            arguments = dict(settings.kwargs)
            made = make_by_class_name(optuna.pruners, settings.class_name, arguments, "pruner")
            assert isinstance(made, BasePruner)
            return made


def _make_gap(enough: int, arguments: Mapping[str, Any]) -> BasePruner:
    try:
        return GapPruner(enough, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"pruner=gap with kwargs={dict(arguments)}: {error}"]) from None


def make_watch(
    settings: PrunerSettings,
    training: TrainingSettings,
    trial: Trial,
    reported: Iterable[int] = (),
    measured: Sequence[tuple[int, float]] = (),
) -> PruningGuard:
    """Return the guard of a trial.

    Args:
        settings: the configured pruner and its rungs.
        training: settings whose warm-up must be over before a trial is pruned.
        trial: the trial to guard.
        reported: the steps that an earlier attempt reported to Optuna.
        measured: earlier attempts' values in Optuna's sign, by optimizer step.
    """
    if len(trial.study.directions) > 1:
        return NullGuard()  # Optuna has no intermediate values of several objectives
    if settings.rungs:
        return ContinuedTrial(RungGuard(settings, training, trial, reported), measured)
    return ContinuedTrial(OpenGuard(trial, reported), measured)


def report_again(trial: Trial, earlier: FrozenTrial, reported: Iterable[int]) -> set[int]:
    """Report what a cancelled trial had reported for the one that continues it.

    Args:
        trial: the trial that continues the cancelled one.
        earlier: the cancelled trial.
        reported: the steps that the trial itself has reported.

    Returns:
        All steps that the trial has reported now.
    """
    # It was decided then, and a trial that was stopped at its last look has no further one
    known = set(reported)
    for step, value in earlier.intermediate_values.items():
        if step not in known:
            trial.report(value, step)
    for key, value in earlier.system_attrs.items():
        if key.startswith(COMPLETED_RUNG):
            trial.storage.set_trial_system_attr(trial._trial_id, key, value)
    return known | set(earlier.intermediate_values)


def as_told(objective: Objective, value: float) -> float:
    """Return a value of the pruning metric with the sign that Optuna's study expects.

    An Optuna study has one direction for intermediate and final values. Where the objective's
    direction differs from the pruning metric's (ROUGE is maximised, the loss that prunes it is
    minimised), the value is negated. Higher is then better for both, and rungs and medians need no
    second rule.
    """
    return value if objective.pruning_direction == objective.direction else -value


class NullGuard:
    """A guard that reports nothing to Optuna and never stops a trial."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See PruningGuard."""
        return False


class ContinuedTrial:
    """A guard that first replays the values of earlier attempts, without deciding on them.

    Without the replay, a trial whose best value came before an interruption would be compared by
    the values after the interruption only.
    """

    def __init__(self, watch: PruningGuard, measured: Sequence[tuple[int, float]]) -> None:
        self._watch = watch
        self._measured = measured

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See PruningGuard."""
        for earlier, then in self._measured:
            if earlier < step:  # what lies beyond the checkpoint is measured again
                self._watch.evaluated(earlier, total_steps, then)
        self._measured = ()
        return self._watch.evaluated(step, total_steps, value)


class ReportedLooks:
    """The looks of a trial that were reported to Optuna, each of which is decided once."""

    def __init__(self, trial: Trial, reported: Iterable[int]) -> None:
        self._trial = trial
        self._reported = set(reported)
        # A driver may have died between this report and its decision
        self._undecided = max(self._reported, default=None)

    def ask(self, at: int, value: float) -> bool:
        """Report the value at a look and return True if the pruner would stop the trial there."""
        if at not in self._reported:
            self._reported.add(at)
            # Optuna keeps the first value reported at a step and warns about a second one.
            self._trial.report(value, at)
        elif at != self._undecided:
            return False
        # A look that was decided after all gets the same answer from the same record. With
        # reproducible=false the record may have grown
        self._undecided = None
        return self._trial.should_prune()


class OpenGuard:
    """A guard that reports every evaluation and always follows Optuna's pruner."""

    def __init__(self, trial: Trial, reported: Iterable[int]) -> None:
        self._looks = ReportedLooks(trial, reported)

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See PruningGuard."""
        return self._looks.ask(permille(step, total_steps), value) and step < total_steps


class RungGuard:
    """A guard that asks the pruner at every rung and follows it after warm-up only.

    An evaluation may pass several rungs at once. Only the newest rung decides: a trial that has
    caught up since an older rung is not stopped for it.
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
        self._looks = ReportedLooks(trial, reported)
        self._last: tuple[float, float] | None = None
        """Position of the last evaluation in the schedule (per-mille), and the best value until then."""

    def evaluated(self, step: int, total_steps: int, value: float) -> bool:
        """See PruningGuard."""
        # The best value so far, not the latest: the kept checkpoint is the best one.
        here = (WHOLE * step / total_steps, self._best(value))
        verdicts = [
            # Asked even when the answer is ignored, because successive halving records the rung while
            # it answers. It prunes the first trials at a rung without any competitor, so its answer
            # counts only once enough others have passed (see _enough)
            self._looks.ask(rung, at)
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

    def _enough(self, rung: int) -> bool:
        """Return True if enough other trials have passed this rung."""
        trials = self._trial.study.get_trials(deepcopy=False)
        there = sum(
            rung in other.intermediate_values
            for other in trials
            if other.number != self._trial.number
        )
        return there >= self._settings.n_startup_trials


def permille(step: int, total_steps: int) -> int:
    """Return the fraction of the schedule that Optuna sees as a step, 0 to WHOLE."""
    return round(WHOLE * step / total_steps)


def value_at(
    rung: int, before: tuple[float, float] | None, here: tuple[float, float]
) -> float | None:
    """Return the value at a rung, interpolated linearly between two evaluations.

    Args:
        rung: the position asked for, in per-mille.
        before: (per-mille, value) of the evaluation before, or None.
        here: (per-mille, value) of the latest evaluation.

    Returns:
        None if the rung does not lie between them. Without an earlier evaluation only `here`
        counts.
    """
    place, value = here
    if _is_near(place, rung):
        return value
    if before is None or _is_near(before[0], rung) or not before[0] < rung < place:
        return None
    return before[1] + (value - before[1]) * (rung - before[0]) / (place - before[0])


def _is_near(place: float, rung: int) -> bool:
    return abs(place - rung) <= NEAR * rung


def may_prune(training: TrainingSettings, rung: int, step: int, total_steps: int) -> bool:
    """Return True if a decision is allowed: at a rung after warm-up and before the end."""
    warmup = training.warmup_length(total_steps)
    # After the last step nothing would be saved.
    return rung * total_steps > WHOLE * warmup and step < total_steps


def audited(settings: PrunerSettings, seed: int, trial_key: str) -> bool:
    """Return True if a trial that the pruner would stop is kept running as an audit.

    Drawn from the trial's name, so that a resumed study makes the same choice.
    """
    return random.Random(f"{seed}/{trial_key}").random() < settings.audit_fraction
