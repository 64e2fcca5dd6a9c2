"""The table that is drawn while a study runs."""

from __future__ import annotations

import io
import logging
import warnings

import pytest
from rich.console import Console

from sweeper.config.settings import Objective
from sweeper.core.outcome import LOOK_ROWS, Outcome
from sweeper.core.quiet import silence_libraries
from sweeper.reporting.live_view import LiveView, PlainView, board_table, make_view
from sweeper.reporting.study_progress import StudyProgress, TrialProgress
from tests.reporting.studies import LOSS, ROUGE


def _board(objective: Objective, values: tuple[float, ...]) -> StudyProgress:
    """Finished trials with these values, and one in training with an eval loss of 2."""
    board = StudyProgress(objective)
    board.open_arm("lora", 4, 0.1)
    for number, value in enumerate(values):
        trial = TrialProgress(f"lora/{number}", "lora", number, {"adapter.r": 8})
        trial.evaluated(3.0, objective)
        trial.end(Outcome(cause="finished", best_value=value))
        board.add(trial)
    running = TrialProgress("lora/9", "lora", 9, {"adapter.r": 8}, state="running")
    for loss in (2.0, 2.5):
        running.evaluated(loss, objective)
    board.add(running)
    return board


def _drawn(board: StudyProgress) -> list[list[str]]:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(board_table(board))
    return [line.split() for line in capture.get().splitlines()]


def test_a_running_trial_shows_its_last_and_its_best_loss() -> None:
    """Where pruning goes by the objective itself, the best so far is known."""
    headline, head, *_, running = _drawn(_board(LOSS, (3.0,)))
    assert headline[:5] == ["lora:", "1", "of", "4", "trials"]
    assert " ".join(head).endswith("eval loss best state")
    assert running[-3:] == ["2.5000", "2.0000", "running"]


def test_values_and_what_prunes_have_columns_of_their_own() -> None:
    """A running trial has a loss and no ROUGE yet; an ended one has both."""
    _, head, *rows = _drawn(_board(ROUGE, (0.3, 0.5, 0.4)))
    assert " ".join(head).endswith("eval loss eval rougeL state")
    assert [row[-3:] for row in rows[:3]] == [
        ["3.0000", f"{value:.4f}", "finished"] for value in (0.3, 0.5, 0.4)
    ]
    assert rows[3][-2:] == ["2.5000", "running"]


def test_a_value_of_a_sample_is_marked_and_not_the_best() -> None:
    """A trial that was pruned at a look at 96 rows has its rows named, and a whole value leads."""
    board = _board(LOSS, (3.0,))
    pruned = TrialProgress("lora/8", "lora", 8, {"adapter.r": 8})
    pruned.end(Outcome(cause="pruned", best_value=1.0, metrics={LOOK_ROWS: 96.0}))
    board.add(pruned)
    assert board.best is not None
    assert board.best.number == 0
    assert " ".join(_drawn(board)[-1]).endswith("1.0000 pruned (value of 96 rows)")
    outcome = Outcome(cause="pruned", best_value=1.0, metrics={LOOK_ROWS: 96.0})
    assert "lora/8 pruned (value of 96 rows), eval loss 1.0000" in pruned.summary(
        outcome, LOSS.metric
    )


def test_the_best_of_a_maximised_objective_is_the_highest() -> None:
    """It alone is drawn in bold green."""
    table = board_table(_board(ROUGE, (0.3, 0.5, 0.4)))
    console = Console(width=100, force_terminal=True, color_system="standard", no_color=False)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert [number for number, line in enumerate(lines[2:5]) if "\x1b[1;32m" in line] == [1]


def test_a_running_trial_tells_when_it_ends() -> None:
    """Ten steps took five seconds: the other thirty take fifteen; a new attempt counts anew."""
    trial = TrialProgress("lora/1", "lora", 1, {}, state="running")
    trial.progressed(10, 50, 900.0, now=100.0)
    assert trial.seconds_left(now=101.0) is None
    trial.progressed(20, 50, 900.0, now=105.0)
    assert trial.seconds_left(now=105.0) == pytest.approx(15.0)
    trial.progressed(4, 50, 900.0, now=200.0)
    assert trial.seconds_left(now=200.0) is None


@pytest.mark.parametrize("paused", [True, False])
def test_a_wait_is_no_part_of_the_pace(paused: bool) -> None:
    """An hour between two steps: nothing is said until the trial runs, then by the pace since."""
    trial = TrialProgress("lora/1", "lora", 1, {}, state="running")
    trial.progressed(10, 50, 900.0, now=100.0)
    trial.progressed(20, 50, 900.0, now=105.0)
    trial.stand_still(paused=paused)
    assert trial.seconds_left(now=3000.0) is None
    trial.progressed(20, 50, 900.0, now=3700.0)
    trial.progressed(30, 50, 900.0, now=3705.0)
    assert trial.seconds_left(now=3705.0) == pytest.approx(10.0)


def test_the_last_trial_of_the_arm_before_stays_in_the_table() -> None:
    """Until it ends, under its whole name; its ended siblings are no longer shown."""
    board = StudyProgress(LOSS)
    board.add(TrialProgress("lora/0010", "lora", 10, {}, state="finished"))
    board.add(TrialProgress("lora/0011", "lora", 11, {}, state="running"))
    board.open_arm("full", 5, 4.5)
    board.add(TrialProgress("full/0000", "full", 0, {}, state="running"))
    names = [row[0] for row in _drawn(board)[2:]]
    assert names == ["lora/0011", "0"]


def test_the_headline_tells_the_best_and_the_time_left() -> None:
    """Two of four trials ended in 60 s each and two run: a minute more."""
    board = StudyProgress(LOSS)
    board.open_arm("lora", 4, 4.5)
    for number, value in enumerate((4.2, 4.1)):
        trial = TrialProgress(f"lora/{number}", "lora", number, {})
        outcome = Outcome(cause="finished", best_value=value, metrics={"cost/seconds": 60.0})
        trial.end(outcome)
        board.add(trial)
    for number in (2, 3):
        board.add(TrialProgress(f"lora/{number}", "lora", number, {}, state="running"))
    headline = " ".join(_drawn(board)[0])
    assert headline.startswith("lora: 2 of 4 trials untuned base 4.5000 best 4.1000 (trial 1)")
    assert headline.endswith("about 60.0 s left")


def test_views_by_verbosity() -> None:
    """Quiet prints nothing, normal an event, verbose each evaluation once."""
    board = _board(LOSS, (3.0,))
    printed = {}
    for verbosity in ("quiet", "normal", "verbose"):
        file = io.StringIO()
        with make_view(Console(file=file, width=200), verbosity) as view:
            view.event("something happened")
            view.update(board)
            view.update(board)
        printed[verbosity] = file.getvalue().splitlines()
    assert [len(lines) for lines in printed.values()] == [0, 1, 2]
    assert printed["verbose"][1].endswith("lora/9 step 0 of 0: eval loss 2.5000")


@pytest.mark.parametrize(
    ("terminal", "environment", "kind"),
    [
        (True, {"TERM": "xterm-256color"}, LiveView),
        (True, {"TERM": "dumb"}, PlainView),
        (True, {"TERM": "xterm-256color", "NO_COLOR": "1"}, PlainView),
        (False, {"TERM": "xterm-256color"}, PlainView),
    ],
    ids=["terminal", "dumb terminal", "NO_COLOR", "pipe"],
)
def test_only_a_terminal_with_colours_is_drawn_on(
    terminal: bool, environment: dict[str, str], kind: type
) -> None:
    """Everything else gets plain lines."""
    console = Console(force_terminal=terminal, _environ=environment, file=io.StringIO())
    assert type(make_view(console)) is kind


def test_other_libraries_are_hushed() -> None:
    """Their warnings and log lines are not printed; sweeper's own warnings are."""
    levels = {name: logging.getLogger(name).level for name in ("mlflow", "optuna", "alembic")}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_libraries()
        for module in ("transformers.trainer", "sweeper.commands.run_study"):
            warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module)
    assert len(seen) == 1
    assert all(logging.getLogger(name).level == logging.ERROR for name in levels)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
