"""One count of trials for the live headline and for `study show`."""

from __future__ import annotations

from typing import get_args

import optuna

from sweeper.core.outcome import Cause, Outcome
from sweeper.reporting.live_view import board_table
from sweeper.reporting.study_progress import StudyProgress, TrialProgress
from sweeper.search.telling import counts, tell
from tests.reporting.studies import LOSS


def _board(*trials: TrialProgress) -> StudyProgress:
    board = StudyProgress(LOSS)
    board.open_arm("lora", 12, 4.5)
    for trial in trials:
        board.add(trial)
    return board


def _ended(number: int, cause: Cause, steps: int = 0, seconds: float = 60.0) -> TrialProgress:
    view = TrialProgress(f"lora/{number:04d}", "lora", number, {})
    value = None if cause == "refused" else 4.0
    metrics = {"cost/seconds": seconds}
    view.end(Outcome(cause=cause, best_value=value, steps=steps, metrics=metrics))
    return view


def _headline(board: StudyProgress) -> str:
    return str(board_table(board).renderables[0])


def test_the_headline_counts_what_study_show_counts() -> None:
    """Every cause, with and without a step: both counts come from one rule."""
    study, views = optuna.create_study(), []
    for cause in get_args(Cause):
        for steps in (0, 10):
            trial = study.ask()
            tell(study, trial, Outcome(cause=cause, best_value=4.0, steps=steps), 4.5)
            views.append(_ended(trial.number, cause, steps))
    shown = sum(map(counts, study.trials))
    assert shown == 12
    assert _headline(_board(*views)).startswith(f"lora: {shown} of 12 trials")


def test_refused_and_paused_trials_are_not_done() -> None:
    """One finished, four refused, one paused: 1 of 12, and eleven medians of a minute are left."""
    refused = [_ended(number, "refused") for number in range(1, 5)]
    paused = TrialProgress("lora/0005", "lora", 5, {}, state="paused")
    board = _board(_ended(0, "finished", 10), *refused, paused)
    assert (board.done, board.seconds_left) == (1, 11 * 60.0)
    assert _headline(board).startswith("lora: 1 of 12 trials")
