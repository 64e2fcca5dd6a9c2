"""Equal tokens for all arms where the length of a trial is searched.

Trials then differ in their epochs, so equal numbers of trials are no equal budgets. A later arm ends
when its trials were trained on as many tokens as those of the first arm, before or after its n_trials.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from sweeper.core.outcome import Outcome, trained_tokens
from sweeper.search.record_prefix import TrialTurn, turn_of
from sweeper.search.study_plan import ArmPlan, StudyPlan

MOST_FACTOR = 2
"""Trials of a later arm per trial that it was given. More of them are left to the user."""
EQUAL_TOKENS = "it was trained on as many tokens as the first arm"
"""The reason why an arm ends before its n_trials."""


@dataclass(frozen=True)
class TokenGoal:
    """The tokens that the search of an arm gets."""

    tokens: float

    def reached(self, read: Sequence[FrozenTrial], turn: TrialTurn) -> bool:
        """Return True if a further trial would bring the arm farther from the goal.

        Args:
            read: the trials that the decision reads, so that it does not depend on what arrives first.
            turn: the place of the further trial. Trials before it that are not read count as typical.
        """
        spent = [spent_tokens(trial) for trial in read]
        trained = [tokens for tokens in spent if tokens > 0]
        if not trained:
            return False
        unread = turn.place - len({turn_of(trial).place for trial in read})
        return sum(spent) + statistics.fmean(trained) * (unread + 0.5) >= self.tokens

    def most_trials(self, wanted: int) -> int:
        """Return the number of trials at which an arm ends although it has fewer tokens."""
        return MOST_FACTOR * wanted


def token_goal(
    plan: StudyPlan, arm: ArmPlan, studies: Mapping[str, optuna.Study | None]
) -> TokenGoal | None:
    """Return the tokens of the first arm for a later one, or None if its number of trials decides.

    Args:
        plan: the study.
        arm: one of its arms.
        studies: the stored studies of its arms, by name.
    """
    first = studies.get(plan.arms[0].name)
    later = arm.name != plan.arms[0].name and arm.run_id is None
    if not (plan.equal_tokens and later) or first is None:
        return None
    tokens = searched_tokens(first)
    # A throughput that was not measured gives no goal
    return TokenGoal(tokens) if tokens > 0 else None


def spent_tokens(trial: FrozenTrial) -> float:
    """Return the tokens that a trial of the storage was trained on."""
    outcome = trial.user_attrs.get("outcome")
    return 0.0 if outcome is None else trained_tokens(Outcome.model_validate(outcome).spent)


def searched_tokens(study: optuna.Study) -> float:
    """Return the tokens that all trials of an arm's search were trained on."""
    return sum(map(spent_tokens, study.get_trials(deepcopy=False)))
