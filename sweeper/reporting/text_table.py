"""Tables of text, drawn for a terminal by rich or written as Markdown, and the format of their cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from sweeper.config.space import Scalar
from sweeper.core.plain_text import in_markdown
from sweeper.reporting.study_progress import short_names

DASH = "–"


@dataclass(frozen=True)
class TextTable:
    """A table of text. Columns named in `left` hold words and are aligned left, all others right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str] = frozenset()

    def draw(self) -> Table:
        """Return the table for a terminal."""
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in self.columns:
            # no_wrap keeps each row on one line.
            left = column in self.left
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def without(self, column: str) -> TextTable:
        """Return the table without one column."""
        at = self.columns.index(column)
        rows = tuple((*row[:at], *row[at + 1 :]) for row in self.rows)
        return replace(self, columns=(*self.columns[:at], *self.columns[at + 1 :]), rows=rows)

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        marks = [":--" if column in self.left else "--:" for column in self.columns]
        cells = [tuple(map(in_markdown, line)) for line in (self.columns, *self.rows)]
        lines = [cells[0], tuple(marks), *cells[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = "{:,.0f}") -> str:
    """Return a number as a cell, or a dash for None."""
    return DASH if value is None else form.format(value)


def counted(count: float, noun: str) -> str:
    """Return a count with its noun: 1 trial, 2 trials."""
    return f"{count:,.0f} {noun}" + "s" * (count != 1)


def capital(words: str) -> str:
    """The words with a capital first letter; the others stay as they are."""
    return words[:1].upper() + words[1:]


def point_words(point: Mapping[str, Scalar]) -> str:
    """A point's values by their short names: learning_rate=0.003, r=8."""
    return ", ".join(f"{name}={value}" for name, value in short_names(point).items())


def duration(seconds: float | None) -> str:
    """Return a duration as a cell in seconds, minutes or hours, or a dash for None."""
    if seconds is None:
        return DASH
    # Up to two minutes, seconds are shown: 100 s says more than 1.7 min.
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
