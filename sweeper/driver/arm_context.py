"""The facts about an arm that do not change while its search runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna

from sweeper.config.input_sources import expected_inputs
from sweeper.config.settings import Objective, PrunerSettings, TrialSettings
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import ArmBaseline, BaselineRun
from sweeper.core.paths import TrialFolder
from sweeper.driver.budget import ArmBudget
from sweeper.driver.study_services import StudyServices
from sweeper.driver.token_goal import TokenGoal
from sweeper.search.study_plan import ArmPlan
from sweeper.tracking.provenance import origin


@dataclass(frozen=True)
class ArmContext:
    """An arm, its Optuna study, its limits, and the services of the study it belongs to."""

    arm: ArmPlan
    study: optuna.Study
    facts: ArmBaseline
    pruner: PrunerSettings
    costs: Sequence[str]
    """Metrics of an outcome that are minimised besides the objective."""
    budget: ArmBudget
    services: StudyServices
    places: int = 1
    """Places before a trial of the newest trial that decisions about it read (record_prefix)."""
    adopted: BaselineRun | None = None
    """An earlier run that replaces the arm's search: its one trial is judged, not trained."""
    goal: TokenGoal | None = None
    """The tokens at which the search ends. None: it ends at its number of trials."""

    @property
    def objective(self) -> Objective:
        """The metric that the arm's trials are compared by."""
        return self.arm.settings.objective

    @property
    def base_value(self) -> float:
        """The untuned base's value of the objective."""
        return self.facts.base_value(self.objective.metric)

    @property
    def origin(self) -> dict[str, str]:
        """Code, machine, data and base: the origin of this arm's results."""
        adopted = {} if self.adopted is None else {"adopted.run_id": self.adopted.run_id}
        return {**origin(self.services.provenance, self.facts), **adopted}

    def inputs(self, settings: TrialSettings) -> InputDigests:
        """Return the digests that a trial must find, as far as the arm's facts tell them."""
        return expected_inputs(self.facts, self.arm.settings.trial, settings)

    def key(self, number: int) -> str:
        """Return a trial's key, as in "lora/0007"."""
        return f"{self.arm.name}/{number:04d}"

    def folder(self, number: int) -> TrialFolder:
        """Return a trial's folder."""
        return self.services.folder.trial(self.arm.name, number)
