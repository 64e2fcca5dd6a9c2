"""The status of an arm, from its storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeper.reporting.study_status import ArmStatus, TrialStatus
from sweeper.search.refinement import refined_count
from sweeper.search.states import STATES
from sweeper.search.study import QUEUED_BY, draw_of, point_of
from sweeper.search.study_plan import ArmPlan
from sweeper.search.telling import counts


def arm_standing(arm: ArmPlan, study: optuna.Study | None) -> ArmStatus:
    """Return the status of an arm. One whose study was never opened has no trials yet."""
    trials = [] if study is None else study.get_trials(deepcopy=False)
    causes = Counter(
        str(trial.user_attrs["cause"])
        for trial in trials
        if trial.state.is_finished() and "cause" in trial.user_attrs
    )
    return ArmStatus(
        name=arm.name,
        wanted=arm.n_trials + refined_count(trials),
        done=sum(map(counts, trials)),
        trials=dict(causes),
        best=_best(arm, trials),
        queue=tuple(map(draw_of, _queue(trials))),
    )


def _queue(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the waiting trials in the order in which sweeper.search.study.ask takes them."""
    waiting = (trial for trial in trials if trial.state is TrialState.WAITING)
    return sorted(waiting, key=lambda trial: QUEUED_BY not in trial.user_attrs)


def _best(arm: ArmPlan, trials: Sequence[FrozenTrial]) -> TrialStatus | None:
    complete = [trial for trial in trials if _may_be_best(trial)]
    order = arm.settings.objective.order
    # the values after the first are costs (hydra.sweeper.costs)
    best = min(complete, key=lambda trial: order(trial.values[0]), default=None)
    if best is None:
        return None
    return TrialStatus(
        trial=f"{arm.name}/{best.number:04d}",
        state=best.user_attrs["cause"],
        point=point_of(best),
        value=best.values[0],
    )


def _may_be_best(trial: FrozenTrial) -> bool:
    cause = trial.user_attrs.get("cause")
    return trial.state is TrialState.COMPLETE and cause in STATES and not STATES[cause].infeasible
