"""Terminal output of a study: a live table or plain lines while it runs, tables and verdict after.

The driver updates StudyProgress, and a view only draws it.
"""

from __future__ import annotations

import io
import time
from typing import Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeper.config.settings import metric_words
from sweeper.reporting.console import PlainConsole, say
from sweeper.reporting.glossary import FOOTNOTE
from sweeper.reporting.rank_ladder import rank_ladders, rank_sheet
from sweeper.reporting.result_tables import (
    comparison,
    conditions,
    finalists,
    leaderboard,
    pareto_front,
)
from sweeper.reporting.results import StudyResults
from sweeper.reporting.study_progress import StudyProgress, StudyView, TrialProgress, format_scalar
from sweeper.reporting.text_table import duration
from sweeper.reporting.verdict import judge

Verbosity = Literal["quiet", "normal", "verbose"]
MAX_ROWS = 20
LEADERBOARD_ROWS = 10
PICTURE_COLUMNS = 140
STYLES = {
    "finished": "green",
    "early_stopped": "green",
    "pruned": "yellow",
    "running": "cyan",
    "waiting": "dim",
    "paused": "dim",
    "cancelled": "dim",
    "duplicate": "dim",
}


class PlainView:
    """A view that prints one line per event, for logs, pipes and NO_COLOR."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def event(self, text: str) -> None:
        """Print an event with the time of day."""
        say(self._console, f"{time.strftime('%H:%M:%S')}  {text}")

    def update(self, board: StudyProgress) -> None:
        """Draw nothing: plain output has no table."""


class QuietView(PlainView):
    """A view that prints nothing before the verdict."""

    def event(self, text: str) -> None:
        """Print nothing."""


class VerboseView(PlainView):
    """A view that prints one line per event and per evaluation."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._shown: dict[str, float] = {}

    def update(self, board: StudyProgress) -> None:
        """Print the evaluations that are new since the last update."""
        for trial in (*board.elsewhere(), *board.current()):
            if trial.value is None or trial.state != "running":
                continue
            # The driver updates several times per evaluation.
            if self._shown.get(trial.key) != trial.value:
                self._shown[trial.key] = trial.value
                self.event(_evaluation(trial, board))


class LiveView(PlainView):
    """A view that prints events above a table of the running arm, refreshed four times a second."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._board: StudyProgress | None = None
        self._live = Live(
            # Transient: at the end the leaderboards take the table's place.
            console=console,
            refresh_per_second=4,
            get_renderable=self._draw,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, board: StudyProgress) -> None:
        """Show the given progress from the next refresh on."""
        self._board = board

    def _draw(self) -> Group | Text:
        return Text("starting …") if self._board is None else board_table(self._board)


def make_view(console: Console, verbosity: Verbosity = "normal") -> StudyView:
    """Return a live table for a terminal with colours, and plain lines for anything else."""
    if verbosity == "quiet":
        return QuietView(console)
    if verbosity == "verbose":
        return VerboseView(console)
    # A live table needs cursor control, which pipes and dumb terminals lack.
    if console.is_terminal and not console.is_dumb_terminal and not console.no_color:
        return LiveView(console)
    return PlainView(console)


def print_results(results: StudyResults, console: Console) -> None:
    """Print leaderboards, gains by rank, the comparison of the arms, the terms and the verdict."""
    for arm in results.arms:
        console.print(leaderboard(arm, LEADERBOARD_ROWS).draw())
        if arm.front:
            console.print(pareto_front(arm).draw())
        if arm.audit is not None:
            say(console, f"{arm.name}: {arm.audit}")
    for ladder in rank_ladders(results):
        console.print(rank_sheet(ladder).draw())
        say(console, f"{ladder.words}\n")
    console.print(comparison(results).draw())
    console.print(conditions(results).draw())
    if (found := finalists(results)) is not None:
        console.print(found.draw())
    console.print(FOOTNOTE, style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print()
    print_answer(results, console)


def print_answer(results: StudyResults, console: Console) -> None:
    """Print the verdict alone: the answer in a line of its own, and all that it rests on."""
    verdict = judge(results)
    console.print(verdict.headline, style="bold", highlight=False, markup=False, soft_wrap=True)
    say(console, f"\n{verdict.text}")


def picture(results: StudyResults) -> str:
    """Return the comparison and the verdict as SVG, for a README or a slide."""
    # An in-memory file keeps the recorded output off the terminal.
    console = PlainConsole(record=True, width=PICTURE_COLUMNS, file=io.StringIO())
    console.print(comparison(results).draw())
    console.print(judge(results).words, highlight=False)
    return console.export_svg(title=f"python -m sweeper {results.command}")


def board_table(board: StudyProgress) -> Group:
    """Return a headline and a table of the running arm's trials, the newest last.

    Trials of another arm that still run come first, under their whole names.
    """
    others, own = board.elsewhere(), board.current()
    # A table higher than the terminal cannot be redrawn in place.
    trials = [*others, *own[-max(1, MAX_ROWS - len(others)) :]]
    keys = list(dict.fromkeys(key for trial in (*others, *own) for key in trial.point))
    table = Table(box=None)
    for name in ("trial", *(key.rsplit(".", 1)[-1] for key in keys)):
        table.add_column(name, justify="right" if name == "trial" else "left")
    objective = board.objective
    # Pruning may go by another metric than the objective, and then both are shown.
    judged, valued = objective.judged_while_training, objective.metric
    best_of = "best" if judged == valued else metric_words(valued)
    for name in ("progress", "left", "tokens/s", metric_words(judged), best_of, "state"):
        table.add_column(name, justify="right")
    for trial in trials:
        name = str(trial.number) if trial.arm == board.arm else trial.key
        table.add_row(name, *_cells(trial, keys, best=trial is board.best))
    # A line above the table, because rich wraps a title to the width of its table.
    return Group(Text(_headline(board), style="bold"), table)


def _headline(board: StudyProgress) -> str:
    base = "" if board.base_value is None else f"   untuned base {board.base_value:.4f}"
    best = (
        "" if board.best is None else f"   best {board.best.best:.4f} (trial {board.best.number})"
    )
    time_left = (
        "" if board.seconds_left is None else f"   about {duration(board.seconds_left)} left"
    )
    left = "".join(f"   {words}" for words in (board.left, board.note) if words)
    return f"{board.arm}: {board.done} of {board.wanted} trials{base}{best}{time_left}{left}"


def _evaluation(trial: TrialProgress, board: StudyProgress) -> str:
    judged = metric_words(board.objective.judged_while_training)
    speed = f", {trial.tokens_per_second:,.0f} tokens/s" if trial.tokens_per_second else ""
    left = trial.seconds_left()
    time_left = "" if left is None else f", {duration(left)} left"
    step = f"step {trial.step} of {trial.total_steps}"
    return f"{trial.key} {step}: {judged} {trial.value:.4f}{speed}{time_left}"


def _cells(trial: TrialProgress, keys: list[str], best: bool) -> list[Text | ProgressBar]:
    # States without an entry are failures.
    style = STYLES.get(trial.state, "red")
    running = trial.state == "running"
    bar: Text | ProgressBar = Text("")
    if running and trial.total_steps:
        bar = ProgressBar(total=trial.total_steps, completed=trial.step, width=12)
    elif trial.seconds is not None:
        bar = Text(f"{trial.seconds:.0f} s")
    speed = f"{trial.tokens_per_second:,.0f}" if running and trial.tokens_per_second else ""
    # An ended trial keeps its last progress, which is no longer of interest.
    left = trial.seconds_left() if running else None
    return [
        *(Text(format_scalar(trial.point.get(key, ""))) for key in keys),
        bar,
        Text("" if left is None else duration(left)),
        Text(speed),
        Text("" if trial.value is None else f"{trial.value:.4f}"),
        Text("" if trial.best is None else f"{trial.best:.4f}", style="bold green" if best else ""),
        Text(trial.ending or trial.state, style=style),
    ]
