"""The one table of the ends of a trial: Optuna's state, MLflow's status, and the meaning of the end.

Imports no Optuna, so that reports and verbs can read the table without loading it. `telling` explains
the columns that concern Optuna.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sweeper.core.outcome import Cause, Outcome
from sweeper.tracking.tracker import RunStatus


@dataclass(frozen=True)
class CauseRow:
    """The meaning of one cause."""

    state: Literal["COMPLETE", "PRUNED", "FAIL"]
    """Optuna's state, a name of optuna.trial.TrialState."""
    status: RunStatus | None
    """MLflow's status, or None for trials that have no run."""
    budget: Literal["yes", "no", "if trained"]
    """"yes" if the trial uses up one of n_trials, "if trained" if it does after its first step."""
    infeasible: bool = False
    """True if the point is impossible: the trial has no value of its own."""
    complete: bool = False
    """True if the trial ran to its own end, so that it can be the best of its arm."""
    open: bool = False
    """True if the trial's point is still to be trained, in a trial that continues this one."""

    @property
    def comparable(self) -> bool:
        """True if the trial has a value of its own that others may be compared with."""
        return self.state != "FAIL" and not self.infeasible


STATES: dict[Cause, CauseRow] = {
    "finished": CauseRow("COMPLETE", "FINISHED", "yes", complete=True),
    "early_stopped": CauseRow("COMPLETE", "FINISHED", "yes", complete=True),
    "pruned": CauseRow("PRUNED", "KILLED", "yes"),
    # a sampler learns nothing from FAIL, so what the point itself causes is COMPLETE (decision 7)
    "oom": CauseRow("COMPLETE", "FAILED", "if trained", infeasible=True),
    "diverged": CauseRow("COMPLETE", "FAILED", "if trained", infeasible=True),
    "refused": CauseRow("COMPLETE", None, "no", infeasible=True),
    "duplicate": CauseRow("COMPLETE", None, "no"),
    "error": CauseRow("FAIL", "FAILED", "no"),
    "crash": CauseRow("FAIL", "FAILED", "yes"),
    "timeout": CauseRow("FAIL", "FAILED", "yes"),
    "cancelled": CauseRow("FAIL", "KILLED", "no", open=True),
}


def uses_budget(outcome: Outcome) -> bool:
    """Return True if a trial with this outcome uses up one of n_trials."""
    budget = STATES[outcome.cause].budget
    return budget == "yes" or (budget == "if trained" and outcome.steps > 0)
