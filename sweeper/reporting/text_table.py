"""Tables of text, drawn for a terminal by rich or written as Markdown, and the format of their cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sweeper.config.space import Scalar
from sweeper.core.plain_text import in_markdown
from sweeper.reporting.study_progress import short_names

DASH = "–"
FOLDED_WIDTH = 12
"""Width in characters to which a column of words may be folded."""
UNBOUNDED = 100_000
"""Width in characters at which every table has its full width."""


@dataclass(frozen=True)
class TextTable:
    """A table of text. Columns named in `left` hold words and are aligned left, all others right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str] = frozenset()
    dropped_first: tuple[str, ...] = ()
    """Columns that a narrow terminal leaves out, the first of them first."""

    def draw(self) -> FittedTable:
        """Return the table for a terminal of any width."""
        return FittedTable(self)

    def whole(self) -> Table:
        """Return the table with all columns for a terminal that is wide enough."""
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in self.columns:
            left = column in self.left
            # A number that is folded or cut is another number, so only words are folded.
            table.add_column(
                column,
                justify="left" if left else "right",
                no_wrap=not left,
                overflow="fold",
                min_width=self._least_width(column) if left else None,
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def without(self, column: str) -> TextTable:
        """Return the table without one column."""
        at = self.columns.index(column)
        rows = tuple((*row[:at], *row[at + 1 :]) for row in self.rows)
        return replace(self, columns=(*self.columns[:at], *self.columns[at + 1 :]), rows=rows)

    def narrower(self) -> Iterator[TextTable]:
        """Yield the table with ever fewer columns, by their priority, down to a single one."""
        sheet = self
        rest = [name for name in self.columns if name not in self.dropped_first]
        for column in (*self.dropped_first, *reversed(rest)):
            if column in sheet.columns and len(sheet.columns) > 1:
                sheet = sheet.without(column)
                yield sheet

    def foldable(self) -> int:
        """Return by how many characters the columns of words can be narrowed."""
        return sum(
            max(0, self._full_width(column) - self._least_width(column))
            for column in self.columns
            if column in self.left
        )

    def _least_width(self, column: str) -> int:
        return min(self._full_width(column), max(cell_len(column), FOLDED_WIDTH))

    def _full_width(self, column: str) -> int:
        at = self.columns.index(column)
        return max(cell_len(row[at]) for row in (self.columns, *self.rows))

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        marks = [":--" if column in self.left else "--:" for column in self.columns]
        cells = [tuple(map(in_markdown, line)) for line in (self.columns, *self.rows)]
        lines = [cells[0], tuple(marks), *cells[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class FittedTable:
    """A table in a terminal: as many columns as its width holds, and the names of the others."""

    sheet: TextTable

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the table, and a line that names what was left out."""
        room = options.max_width
        shown = next(
            (sheet for sheet in self._candidates() if _width(sheet, console, options) <= room), None
        )
        if shown is None:
            # Not even the first column fits, so each row takes a line, which the terminal breaks.
            yield Text("\n".join(_lines(self.sheet)), overflow="fold")
            return
        yield shown.whole()
        if left_out := [name for name in self.sheet.columns if name not in shown.columns]:
            words = f"Left out at {room} columns: {', '.join(left_out)}."
            yield Text(f"{words}\n", style="dim")

    def _candidates(self) -> Iterator[TextTable]:
        yield self.sheet
        yield from self.sheet.narrower()


def _width(sheet: TextTable, console: Console, options: ConsoleOptions) -> int:
    """Return the least width in characters that a table needs to show all numbers."""
    full = Measurement.get(console, options.update(max_width=UNBOUNDED), sheet.whole()).maximum
    return full - sheet.foldable()


def _lines(sheet: TextTable) -> Sequence[str]:
    pairs = (zip(sheet.columns, row, strict=True) for row in sheet.rows)
    return [", ".join(f"{name} {cell}" for name, cell in row) for row in pairs]


def number(value: float | None, form: str = "{:,.0f}") -> str:
    """Return a number as a cell, or a dash for None."""
    return DASH if value is None else form.format(value)


def counted(count: float, noun: str) -> str:
    """Return a count with its noun: 1 trial, 2 trials."""
    return f"{count:,.0f} {noun}" + "s" * (count != 1)


def perplexity_factor(nats: float) -> str:
    """Return a difference of losses in nats as a factor in perplexity."""
    return f"a factor of {math.exp(nats):.3f} in perplexity"


def capital(words: str) -> str:
    """Return the words with a capital first letter. Their other letters stay as they are."""
    return words[:1].upper() + words[1:]


def point_words(point: Mapping[str, Scalar]) -> str:
    """Return a point's values by their short names: learning_rate=0.003, r=8."""
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
