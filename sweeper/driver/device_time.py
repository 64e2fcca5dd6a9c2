"""Device time of a study so far: what its trials and its finalists cost."""

from __future__ import annotations

from collections.abc import Mapping

import optuna

from sweeper.core.outcome import Outcome, device_seconds
from sweeper.core.paths import StudyFolder
from sweeper.reporting.finalist_results import finalists_seconds


def spent_seconds(studies: Mapping[str, optuna.Study | None], folder: StudyFolder) -> float:
    """Return the device seconds of all trials and finalists so far.

    Args:
        studies: each arm's study by the arm's name, None where the arm has not begun.
        folder: the folder of the study_name they belong to.
    """
    return sum(
        searched_seconds(study) + finalists_seconds(folder, arm)
        for arm, study in studies.items()
        if study is not None
    )


def searched_seconds(study: optuna.Study) -> float:
    """Return the device seconds of all trials of an arm's search."""
    outcomes = (trial.user_attrs.get("outcome") for trial in study.get_trials(deepcopy=False))
    return sum(
        device_seconds(Outcome.model_validate(outcome).spent) for outcome in outcomes if outcome
    )
