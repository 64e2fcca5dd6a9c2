"""Charts as SVG text: dots, lines, bars and parallel axes, drawn from plain numbers and labels.

Series differ in shape and dash as well as in colour, so that they can be told apart in black and white.
Colours are CSS classes (s0 … s5) that the page's stylesheet fills in for light and dark themes. Every
mark has a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

# Own SVG instead of matplotlib or plotly: matplotlib takes seconds to import and fixes the colours,
# and plotly.js alone is larger than the 2 MB that a page may have.
ASSETS = Path(__file__).parent / "assets"
# units of the viewBox, which the page scales to its width
WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, BOTTOM = 62, 14, 46
RANGES_WIDTH = 400
"""Width of a chart of ranges. On a phone a wider one would have small letters."""
LEGEND_ROW = 20
LETTER = 7.2
"""Approximate width of a letter in units of the viewBox, for the layout of labels."""
SERIES = 6
"""Number of series colours. Further series reuse them from the first."""


@dataclass(frozen=True)
class ChartAxis:
    """One axis: its label, its ends, and its ticks as pairs of value and text."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value on the axis: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class ChartDot:
    """One point with its tooltip. `hollow` marks a trial that was stopped early."""

    x: float
    y: float
    tooltip: str
    series: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class ChartLine:
    """A line through points. `cut` ends the line in a cross, `strong` draws it thick and in front."""

    points: tuple[tuple[float, float], ...]
    tooltip: str
    series: int = 0
    strong: bool = False
    cut: bool = False


@dataclass(frozen=True)
class ChartRange:
    """A value with its interval, as a row of its own. Both ends are None without an interval."""

    name: str
    value: float
    text: str
    """The value as it is written at the right."""
    low: float | None = None
    high: float | None = None
    series: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class RangePanel:
    """Rows of values over one axis, with a line at a value and a band around it."""

    title: str
    rows: tuple[ChartRange, ...]
    line: float
    line_name: str
    band: tuple[float, float] | None = None
    band_name: str = ""


def number_axis(label: str, values: Iterable[float], log: bool = False) -> ChartAxis:
    """Return an axis that covers all values, with round ticks.

    Raises:
        ValueError: there is no value, or a log axis has one at or below zero.
    """
    found = list(values)
    if not found or (log and min(found) <= 0):
        raise ValueError(f"no axis {label!r} for {found[:3]}")
    low, high = min(found), max(found)
    if log:
        # A single value gets a range around it, so that its mark is not on the frame.
        low, high = (low / 1.5, high * 1.5) if low < high else (low / 3, high * 3)
        return ChartAxis(label, low, high, _log_ticks(low, high), log=True)
    # Equal values have no range, and zeros have no size either.
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    return ChartAxis(label, low, high, _linear_ticks(low, high))


def step_axis(label: str, values: Iterable[float], log: bool = False) -> ChartAxis:
    """Return an axis with one tick at each of a few values."""
    found = sorted(set(values))
    axis = number_axis(label, found, log)
    return replace(axis, ticks=tuple((value, _short(value)) for value in found))


def word_axis(label: str, words: Sequence[str]) -> ChartAxis:
    """Return an axis of categories. The position of a word is its index."""
    ticks = tuple((float(place), word) for place, word in enumerate(words))
    return ChartAxis(label, -0.5, len(words) - 0.5, ticks)


def plot(
    title: str,
    description: str,
    axes: tuple[ChartAxis, ChartAxis],
    dots: Sequence[ChartDot] = (),
    lines: Sequence[ChartLine] = (),
    legend: Sequence[str] = (),
) -> str:
    """Return a chart of dots and lines over two axes. `legend` names the series in order."""
    rows = _legend_rows(legend)
    frame = _Frame(axes, top=14 + LEGEND_ROW * len(rows))
    # Later elements are drawn on top in SVG, so thick lines come last.
    ordered = sorted(lines, key=lambda line: line.strong)
    parts = [
        *frame.grid(),
        *(frame.line(line) for line in ordered),
        *(frame.dot(dot) for dot in dots),
        *(_legend(rows)),
    ]
    return _svg(title, description, WIDTH, HEIGHT, parts)


def bars(title: str, description: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Return a chart of horizontal bars. Rows are (name, length, text right of the bar)."""
    step, left = 28, 12 + LETTER * max(len(name) for name, _, _ in rows)
    longest = max(length for _, length, _ in rows) or 1.0
    room = WIDTH - left - 70
    parts = []
    for place, (name, length, text) in enumerate(rows):
        y = 8 + step * place
        # A bar of zero length would be invisible.
        width = max(room * length / longest, 1.0)
        parts += [
            _text(left - 6, y + 14, name, "end"),
            f'<rect class="f s0" x="{left:.0f}" y="{y}" width="{width:.1f}" height="18"/>',
            _text(left + width + 6, y + 14, text),
        ]
    return _svg(title, description, WIDTH, 16 + step * len(rows), parts)


def ranges(title: str, description: str, panels: Sequence[RangePanel]) -> str:
    """Return a chart of values with their intervals, in one or more panels of an axis each."""
    parts: list[str] = []
    top = 0
    for panel in panels:
        drawn, height = _range_panel(panel, top)
        parts += drawn
        top += height
    return _svg(title, description, RANGES_WIDTH, top, parts)


def _range_panel(panel: RangePanel, top: int) -> tuple[list[str], int]:
    """Return the elements of a panel that begins at a height, and its own height."""
    head, step, foot = 26, 26, 26
    left = 14 + LETTER * max(len(row.name) for row in panel.rows)
    right = RANGES_WIDTH - 12 - LETTER * max(len(row.text) for row in panel.rows)
    values = [end for row in panel.rows for end in (row.low, row.value, row.high)]
    known = [value for value in (*values, panel.line, *(panel.band or ())) if value is not None]
    axis = number_axis("", known)
    bottom = top + head + step * len(panel.rows)

    def across(value: float) -> float:
        return round(left + axis.place(value) * (right - left), 1)

    parts = [_text(4, top + 15, panel.title, kind="strong")]
    if panel.band is not None:
        low, high = map(across, panel.band)
        parts.append(
            f'<rect class="band" x="{low}" y="{top + head}" width="{high - low:.1f}" '
            f'height="{bottom - top - head}"><title>{escape(panel.band_name)}</title></rect>'
        )
    for value, text in axis.ticks:
        x = across(value)
        parts.append(f'<path class="grid" d="M{x} {top + head}V{bottom}"/>')
        parts.append(_text(x, bottom + 15, text, "middle"))
    line = f"<title>{escape(panel.line_name)}</title>"
    parts.append(
        f'<path class="axis" d="M{across(panel.line)} {top + head}V{bottom}">{line}</path>'
    )
    for place, row in enumerate(panel.rows):
        parts += _range_row(row, top + head + step * place + step // 2, across)
    return parts, bottom - top + foot


def _range_row(row: ChartRange, y: int, across: Callable[[float], float]) -> list[str]:
    """Return the name, the whisker, the mark and the text of a row."""
    series = row.series % SERIES
    parts = [_text(4, y + 4, row.name), _text(RANGES_WIDTH - 4, y + 4, row.text, "end")]
    if row.low is not None and row.high is not None:
        ends = f"M{across(row.low)} {y}H{across(row.high)}"
        caps = "".join(f"M{across(end)} {y - 4}v8" for end in (row.low, row.high))
        parts.append(f'<path class="l strong plain s{series}" d="{ends}{caps}"/>')
    tooltip = f"<title>{escape(f'{row.name}: {row.text}')}</title>"
    kind = "h" if row.hollow else "f"
    return [*parts, _shape(across(row.value), y, row.series, kind, tooltip)]


def parallel(
    title: str, description: str, axes: Sequence[ChartAxis], lines: Sequence[ChartLine]
) -> str:
    """Return a chart of parallel coordinates. Points of a line are (index of the axis, value on it)."""
    width, height, top, bottom = 960, 340, 34, 24
    gap = (width - 150) / max(len(axes) - 1, 1)

    def at(index: float, value: float) -> str:
        share = axes[int(index)].place(value)
        return f"{60 + gap * index:.0f},{height - bottom - share * (height - top - bottom):.0f}"

    parts = []
    for line in sorted(lines, key=lambda line: line.strong):
        points = " ".join(at(*point) for point in line.points)
        kind = "l strong" if line.strong else "l faint"
        tooltip = f"<title>{escape(line.tooltip)}</title>"
        parts.append(
            f'<polyline class="{kind} s{line.series}" points="{points}">{tooltip}</polyline>'
        )
    for index, axis in enumerate(axes):
        x = 60 + gap * index
        parts.append(f'<path class="axis" d="M{x:.0f} {top}V{height - bottom}"/>')
        parts.append(_text(x, 18, axis.label, "middle", "name"))
        for value, text in axis.ticks:
            y = float(at(index, value).split(",")[1])
            parts.append(_text(x + 5, y + 4, text, kind="halo"))
    return _svg(title, description, width, height, parts)


class _Frame:
    """The plotting area between two axes."""

    def __init__(self, axes: tuple[ChartAxis, ChartAxis], top: int) -> None:
        self._x, self._y = axes
        self._top = top

    def grid(self) -> list[str]:
        """Return the grid lines, the tick labels and the names of the axes."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value, text in self._x.ticks:
            x = self._across(value)
            parts.append(f'<path class="grid" d="M{x} {self._top}V{bottom}"/>')
            parts.append(_text(x, bottom + 17, text, "middle"))
        for value, text in self._y.ticks:
            y = self._up(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
            parts.append(_text(LEFT - 6, y + 4, text, "end"))
        middle = (self._top + bottom) / 2
        return [
            *parts,
            f'<path class="axis" d="M{LEFT} {self._top}V{bottom}H{right}"/>',
            _text((LEFT + right) / 2, HEIGHT - 8, self._x.label, "middle", "name"),
            f'<text class="name" transform="translate(13 {middle}) rotate(-90)" '
            f'text-anchor="middle">{escape(self._y.label)}</text>',
        ]

    def dot(self, dot: ChartDot) -> str:
        """Return a dot with its tooltip."""
        # The CSS classes h and f draw a hollow and a filled shape.
        kind = "h" if dot.hollow else "f"
        tooltip = f"<title>{escape(dot.tooltip)}</title>"
        return _shape(self._across(dot.x), self._up(dot.y), dot.series, kind, tooltip)

    def line(self, line: ChartLine) -> str:
        """Return a line with its tooltip, and a cross at its end if it is cut."""
        placed = [(self._across(x), self._up(y)) for x, y in line.points]
        points = " ".join(f"{x},{y}" for x, y in placed)
        kind = "l strong" if line.strong else "l"
        tooltip = f"<title>{escape(line.tooltip)}</title>"
        series = line.series % SERIES
        drawn = f'<polyline class="{kind} s{series}" points="{points}">{tooltip}</polyline>'
        if not line.cut:
            return drawn
        x, y = placed[-1]
        cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'{drawn}<path class="l strong s{series}" d="{cross}"/>'

    def _across(self, value: float) -> float:
        return round(LEFT + self._x.place(value) * (WIDTH - LEFT - RIGHT), 1)

    def _up(self, value: float) -> float:
        bottom = HEIGHT - BOTTOM
        return round(bottom - self._y.place(value) * (bottom - self._top), 1)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {at}>{escape(text)}</text>'


def _shape(x: float, y: float, series: int, kind: str, inside: str = "") -> str:
    """Return the mark of a series: circle, square, triangle or diamond, in turn."""
    name = f'class="{kind} s{series % SERIES}"'
    match series % 4:
        case 0:
            return f'<circle {name} cx="{x}" cy="{y}" r="4">{inside}</circle>'
        case 1:
            path = f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z"
        case 2:
            path = f"M{x} {y - 5:.1f}l5 9h-10z"
        case _:
            path = f"M{x} {y - 5:.1f}l5 5l-5 5l-5 -5z"
    return f'<path {name} d="{path}">{inside}</path>'


def _legend_rows(names: Sequence[str]) -> list[list[tuple[int, float, str]]]:
    """Return rows of (series, x, name) for the legend, or no row for a single series."""
    rows: list[list[tuple[int, float, str]]] = []
    x = math.inf
    # A single series needs no legend.
    for series, name in enumerate(names if len(names) > 1 else ()):
        width = 26 + LETTER * len(name)
        # Names that do not fit start a new row.
        if x + width > WIDTH - RIGHT:
            rows.append([])
            x = float(LEFT)
        rows[-1].append((series, x, name))
        x += width
    return rows


def _legend(rows: Sequence[Sequence[tuple[int, float, str]]]) -> list[str]:
    parts = []
    for place, row in enumerate(rows):
        y = 13 + LEGEND_ROW * place
        for series, x, name in row:
            parts.append(_shape(x, y - 4, series, "f"))
            parts.append(_text(x + 9, y, name))
    return parts


def _linear_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Return about five round numbers (1, 2 or 5 times a power of ten) from low to high."""
    # The step is the smallest of 1, 2, 5 and 10 times a power of ten with at most five ticks.
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    digits = max(0, -math.floor(math.log10(step)))
    return tuple((n * step, f"{n * step:,.{digits}f}") for n in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Return powers of ten from low to high, with twos and fives if there are few of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    # float("5e-4") is exact to the last digit, 5 * 10.0 ** -4 is not.
    values = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return tuple((value, _short(value)) for value in values if low <= value <= high)


def _short(value: float) -> str:
    """Return a number in short form: 10k, 2M, 0.003."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            # Thousands are shortened from 10,000 on, where the digits stop fitting an axis.
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def picture_style() -> str:
    """Return the stylesheet of pictures, for light and dark screens and for paper."""
    return (ASSETS / "picture.css").read_text(encoding="utf-8")


def standalone(svg: str) -> str:
    """Return a picture that carries its colours, as a file for any SVG viewer."""
    ground = "svg { background: var(--paper); }"
    return svg.replace("><title>", f"><style>{picture_style()}{ground}</style><title>", 1) + "\n"


def _svg(title: str, description: str, width: int, height: int, parts: Sequence[str]) -> str:
    """Return an SVG element with a title and a description for screen readers."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )
