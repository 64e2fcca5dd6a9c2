"""Tables in terminals of any width."""

from __future__ import annotations

import io
import random
import re

import pytest

from sweeper.reporting.console import PlainConsole
from sweeper.reporting.result_tables import comparison, conditions, leaderboard
from sweeper.reporting.text_table import TextTable
from tests.reporting.studies import two_arms
from tests.reporting.test_html_page import many


def shown(sheet: TextTable, width: int) -> str:
    """What a terminal of a width shows."""
    file = io.StringIO()
    PlainConsole(width=width, file=file).print(sheet.draw())
    return file.getvalue()


def words(text: str) -> list[str]:
    """The words of a text, without the lines of a table."""
    return re.findall(r"[^\s─]+", text)


def random_sheet(seed: int) -> TextTable:
    """A table of words and numbers of random lengths."""
    draw = random.Random(seed)
    columns = tuple(f"c{n}" + "x" * draw.randint(0, 9) for n in range(draw.randint(1, 9)))
    left = frozenset(name for name in columns if draw.random() < 0.3)
    rows = tuple(
        tuple(
            " ".join("w" * draw.randint(1, 20) for _ in range(draw.randint(1, 4)))
            if name in left
            else f"{draw.random() * 10 ** draw.randint(0, 9):,.4f}"
            for name in columns
        )
        for _ in range(3)
    )
    first = tuple(draw.sample(columns, draw.randint(0, len(columns))))
    return TextTable("A title", columns, rows, left, first)


@pytest.mark.parametrize("seed", range(6))
def test_no_number_is_ever_cut(seed: int) -> None:
    """At every width a number stands whole or not at all, and each column is shown or named."""
    sheet = random_sheet(seed)
    numbers = {
        cell
        for row in sheet.rows
        for name, cell in zip(sheet.columns, row, strict=True)
        if name not in sheet.left
    }
    for width in (*range(24, 100, 13), 160, 400):
        text = shown(sheet, width)
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())
        told = words(text)
        assert {word.rstrip(",") for word in told if re.search(r"\d\.\d", word)} <= numbers
        assert all(name in {word.rstrip(",.") for word in told} for name in sheet.columns)


def test_columns_are_dropped_by_their_priority() -> None:
    """The first column of the list goes first, and the line below the table names what went."""
    row = ("aaaa", "bbbb", "cccc", "dddd")
    sheet = TextTable("t", ("a", "b", "c", "d"), (row,), dropped_first=("b", "a"))
    wide = shown(sheet, 60)
    assert "Left out" not in wide
    assert words(shown(sheet, 22))[1:] == [
        *("a", "c", "d", "aaaa", "cccc", "dddd"),
        *words("Left out at 22 columns: b."),
    ]
    assert words(shown(sheet, 16))[1:5] == ["c", "d", "cccc", "dddd"]
    # Columns without a priority go last, from the right.
    assert words(shown(sheet, 8))[1:3] == ["c", "cccc"]


@pytest.mark.parametrize("width", [80, 110, 160])
def test_a_report_shows_the_values_at_every_width(width: int) -> None:
    """The compared value and the learning rate are on every screen, the rest as it fits."""
    study = two_arms(4.05, 4.0)
    values = ["4.0500", "4.0000", "4.5000"]
    assert all(value in words(shown(comparison(study), width)) for value in values)
    assert "0.001" in words(shown(conditions(study), width))
    board = leaderboard(many(12).arms[0])
    text = shown(board, width)
    for trial in many(12).arms[0].trials:
        assert f"{trial.value:.4f}" in words(text)
    assert ("Left out" in text) == (width < 160)


def test_a_table_of_some_trials_says_so() -> None:
    """A terminal shows the best ten. Its title tells them from all of them."""
    arm = many(12).arms[0]
    assert leaderboard(arm, 10).title.endswith(", the best 10")
    assert "best" not in leaderboard(arm, 12).title
    assert "best" not in leaderboard(arm).title
