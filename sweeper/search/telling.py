"""Tells the Optuna study how a trial ended, by the rules of the state table.

An infeasible trial (out of memory, diverged, refused) is told as COMPLETE with the untuned base's
value and a constraint above zero: every sampler learns from that, and no best trial is ever one of
them. FAIL would teach nothing, and PRUNED with a constraint is ignored by the GP sampler. Feasible
trials are told with the same constraint, below zero: the GP sampler wants it of every trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeper.core.outcome import Outcome
from sweeper.search.states import STATES, uses_budget

INFEASIBLE = "infeasible"
"""The one constraint's name in Optuna's storage."""


def judged(outcome: Outcome, costs: Sequence[str]) -> Outcome:
    """Return the outcome, or an error if it lacks a value that the study compares."""
    row = STATES[outcome.cause]
    if row.state != "COMPLETE" or row.infeasible:
        return outcome
    missing = [name for name in costs if name not in outcome.metrics]
    if outcome.best_value is None:
        message = "ended without a single evaluation"
    elif missing:
        known = ", ".join(sorted(outcome.metrics)) or "none"
        message = f"has no metric {missing[0]} for hydra.sweeper.costs. Its metrics: {known}"
    else:
        return outcome
    return outcome.model_copy(update={"cause": "error", "message": message})


def tell(
    study: Study, trial: Trial, outcome: Outcome, base_value: float, costs: Sequence[str] = ()
) -> None:
    """Tell Optuna an outcome: attributes first, the state last, so that a crash in between is seen
    as a trial that still runs.

    Args:
        study: the arm's study.
        trial: as asked or adopted.
        outcome: how it ended.
        base_value: the untuned base's value of the objective, told for an infeasible trial.
        costs: metrics of the outcome that the study minimises besides its objective.
    """
    row = STATES[outcome.cause]
    # A value of a sample is no final value, so a duplicate of a pruned trial is told as pruned too
    sampled = row.state == "COMPLETE" and not row.infeasible and outcome.look_rows is not None
    trial.set_user_attr("cause", outcome.cause)
    trial.set_user_attr("counts", uses_budget(outcome))
    trial.set_user_attr("outcome", outcome.model_dump(mode="json"))
    # Else a killed driver set it
    if row.state == "COMPLETE" and not sampled and not trial.constraints:
        # Optuna takes a constraint above 0 for violated
        trial.set_constraint(INFEASIBLE, 1.0 if row.infeasible else -1.0)
    if row.infeasible:
        worst = [_worst(trial.study, index) for index, _ in enumerate(costs, start=1)]
        study.tell(trial.number, [base_value, *worst])
    elif sampled:
        study.tell(trial.number, state=TrialState.PRUNED)
    elif row.state == "COMPLETE":
        assert outcome.best_value is not None, f"{outcome.cause} without an evaluation"
        study.tell(trial.number, [outcome.best_value, *(outcome.metrics[name] for name in costs)])
    else:
        study.tell(trial.number, state=TrialState[row.state])


def feasible(trial: FrozenTrial) -> bool:
    """Return True if a finished trial has a value of its own, not the untuned base's."""
    return all(value <= 0 for value in trial.constraints.values())


def is_measured(trial: FrozenTrial) -> bool:
    """Return True if a trial ran to its own end with a value that no other trial has lent."""
    # counted again, the result of a duplicate would look as certain as two trainings
    if trial.state is not TrialState.COMPLETE or trial.user_attrs.get("cause") == "duplicate":
        return False
    return feasible(trial) and math.isfinite(trial.values[0])


def _worst(study: Study, index: int) -> float:
    """Return the highest cost so far, or 0 before any: the constraint alone rules the trial out."""
    told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max((trial.values[index] for trial in told), default=0.0)


def counts(trial: FrozenTrial) -> bool:
    """Return True if a trial in storage uses up one of n_trials."""
    return bool(trial.user_attrs.get("counts", False)) and trial.state.is_finished()
