"""The table that is drawn while a study runs."""

from __future__ import annotations

from rich.console import Console

from sweeper.outcome import Outcome
from sweeper.reporting.view import board_table
from sweeper.search.board import Board, TrialView
from sweeper.settings import Objective
from tests.reporting.studies import LOSS, ROUGE


def _board(objective: Objective, values: tuple[float, ...]) -> Board:
    """Finished trials with these values, and one in training with an eval loss of 2."""
    board = Board(objective)
    board.open_arm("lora", 4, 0.1)
    for number, value in enumerate(values):
        trial = TrialView(f"lora/{number}", "lora", number, {"adapter.r": 8})
        trial.evaluated(3.0, objective)
        trial.ended(Outcome(cause="finished", best_value=value))
        board.add(trial)
    running = TrialView("lora/9", "lora", 9, {"adapter.r": 8}, state="running")
    for loss in (2.0, 2.5):
        running.evaluated(loss, objective)
    board.add(running)
    return board


def _drawn(board: Board) -> list[list[str]]:
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


def test_the_best_of_a_maximised_objective_is_the_highest() -> None:
    """It alone is drawn in bold green."""
    table = board_table(_board(ROUGE, (0.3, 0.5, 0.4)))
    console = Console(width=100, force_terminal=True, color_system="standard", no_color=False)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert [number for number, line in enumerate(lines[2:5]) if "\x1b[1;32m" in line] == [1]
