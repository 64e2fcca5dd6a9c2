"""The state of a study that commands may change while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import optuna

from sweeper.core.errors import CommandRefused
from sweeper.reporting.study_progress import StudyProgress
from sweeper.search.study_plan import ArmPlan, StudyPlan


@dataclass
class StudyState:
    """A study's plan, with the totals that commands have raised, and the arms that were opened."""

    plan: StudyPlan
    board: StudyProgress
    studies: dict[str, optuna.Study] = field(default_factory=dict)
    """The Optuna study of each arm that was ever opened."""
    searches_ended: bool = False
    """True once every search has ended and the finalists run."""
    cut_short: bool = False
    """True if the budget left further seeds of the finalists out."""

    def arm(self, name: str | None) -> ArmPlan:
        """Return an arm by its name, or the first one without a name.

        Raises:
            CommandRefused: there is no arm of this name.
        """
        arms = {arm.name: arm for arm in self.plan.arms}
        if name is None:
            return self.plan.arms[0]
        if name not in arms:
            raise CommandRefused(f"--arm {name}: no such arm. Choose {', '.join(arms)}")
        return arms[name]

    def total(self, arm: str) -> int:
        """Return an arm's current n_trials."""
        return self.arm(arm).n_trials

    def replace_arm(self, arm: ArmPlan) -> None:
        """Replace the arm of the same name, once its data have decided its space."""
        arms = tuple(arm if each.name == arm.name else each for each in self.plan.arms)
        self.plan = replace(self.plan, arms=arms)

    def raise_totals(self, totals: Mapping[str, int]) -> None:
        """Raise each arm's n_trials to at least the given total."""
        arms = tuple(
            replace(arm, n_trials=max(arm.n_trials, totals.get(arm.name, 0)))
            for arm in self.plan.arms
        )
        study = self.plan.study.model_copy(update={"n_trials": arms[0].n_trials})
        self.plan = replace(self.plan, arms=arms, study=study)
        if self.board.arm in totals:
            self.board.wanted = self.total(self.board.arm)
