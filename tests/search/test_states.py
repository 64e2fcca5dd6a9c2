"""The state table, row by row, told to a real Optuna study."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import optuna
import pytest
from optuna.trial import TrialState

from sweeper.core.outcome import LOOK_ROWS, Cause, Outcome
from sweeper.core.paths import StudyFolder
from sweeper.driver.device_time import spent_seconds
from sweeper.search.states import STATES
from sweeper.search.telling import counts, feasible, tell

BASE = 4.5


def _told(cause: Cause, *, value: float | None = 4.0, steps: int = 10) -> optuna.trial.FrozenTrial:
    study = optuna.create_study()
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.report(4.2, 100)
    tell(study, trial, Outcome(cause=cause, best_value=value, steps=steps), BASE)
    return study.trials[0]


def test_every_cause_has_a_row() -> None:
    """No cause is without a meaning."""
    assert set(STATES) == set(get_args(Cause))


@pytest.mark.parametrize("cause", ["finished", "early_stopped"])
def test_finished_trials_are_worth_their_best_evaluation(cause: Cause) -> None:
    """COMPLETE with the best evaluation, not the last."""
    trial = _told(cause, value=3.9)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 3.9)
    assert trial.constraints == {"infeasible": -1.0}
    assert feasible(trial)
    assert counts(trial)


def test_a_value_of_a_sample_is_no_final_value() -> None:
    """The twin of a trial that was pruned at a look at a sample is told as pruned, too."""
    study = optuna.create_study()
    trial = study.ask()
    trial.report(4.2, 250)
    twin = Outcome(cause="duplicate", best_value=4.2, metrics={LOOK_ROWS: 96.0})
    tell(study, trial, twin, BASE)
    (told,) = study.trials
    assert (told.state, told.value, told.constraints) == (TrialState.PRUNED, 4.2, {})
    assert (twin.look_rows, twin.ending) == (96, "duplicate (value of 96 rows)")


@pytest.mark.parametrize("cause", ["oom", "diverged", "refused"])
def test_infeasible_trials_teach_the_sampler_and_are_never_best(cause: Cause) -> None:
    """COMPLETE with the untuned base's value, and the constraint above zero."""
    trial = _told(cause, value=None)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, BASE)
    assert trial.constraints == {"infeasible": 1.0}
    assert not feasible(trial)


def test_an_infeasible_trial_is_not_the_best_even_when_alone_lower() -> None:
    """best_trial skips infeasible trials, whatever they are worth."""
    study = optuna.create_study()
    bad, good = study.ask(), study.ask()
    tell(study, bad, Outcome(cause="oom", steps=1), base_value=1.0)
    tell(study, good, Outcome(cause="finished", best_value=4.0), base_value=1.0)
    assert study.best_trial.number == good.number


@pytest.mark.parametrize(
    ("cause", "steps", "counted"),
    [
        ("oom", 3, True),
        ("oom", 0, False),
        ("diverged", 1, True),
        ("refused", 0, False),
        ("pruned", 5, True),
        ("error", 5, False),
        ("crash", 5, True),
        ("cancelled", 5, False),
        ("duplicate", 0, False),
    ],
)
def test_what_counts_to_n_trials(cause: Cause, steps: int, counted: bool) -> None:
    """Trained trials use up the budget; refusals, duplicates, code errors and Ctrl-C do not."""
    assert counts(_told(cause, steps=steps)) is counted


def test_a_duplicate_spends_no_device_time(tmp_path: Path) -> None:
    """It is told with its twin's figures, and a budget counts the twin alone."""
    study = optuna.create_study()
    causes: tuple[Cause, ...] = ("finished", "duplicate", "pruned")
    for cause in causes:
        outcome = Outcome(cause=cause, best_value=4.0, metrics={"cost/seconds": 10.0})
        tell(study, study.ask(), outcome, BASE)
    assert spent_seconds({"lora": study}, StudyFolder(tmp_path)) == 20.0


def test_pruned_and_failed_states() -> None:
    """Pruned is PRUNED, a code error and a crash are FAIL."""
    assert _told("pruned").state is TrialState.PRUNED
    assert _told("error").state is TrialState.FAIL
    assert _told("crash").state is TrialState.FAIL
