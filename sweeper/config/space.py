"""Search spaces: domains, branches, and the points and grids that they allow.

Knows neither Hydra (sweeper.config.grammar parses the text) nor Optuna (sweeper.search draws).

A space maps setting keys to domains. It has two views of one trial's values. A *point* has one
value per setting key, as the configuration sees it. A *draw* has one value per parameter, as the
sampler sees it. They differ only inside branches, where one key may have several domains. There a
parameter is named by the path to it ("adapter.use_dora=true/adapter.r").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

Scalar = str | int | float | bool | None
Point = dict[str, Scalar]
"""One value per searched key. A list is written as its override text, e.g. "[q_proj,v_proj]"."""
Draw = dict[str, Scalar]
"""One value per parameter of the sampler."""
MAX_VALUES = 10_000
"""Maximum number of values of one choice, or of one key of a grid. Every stored trial carries them."""


@dataclass(frozen=True)
class Choice:
    """One of several values without an order."""

    values: tuple[Scalar, ...]

    def __contains__(self, value: Scalar) -> bool:
        return value in self.values

    def snap(self, value: Scalar) -> Scalar:
        """Return the value unchanged, because there is nothing between choices."""
        return value

    def probes(self) -> tuple[Scalar, ...]:
        """Return the values whose validity implies the domain's: all of them."""
        return self.values

    def __str__(self) -> str:
        return f"choice({', '.join(map(word, self.values))})"


@dataclass(frozen=True)
class Interval:
    """A number between low and high, both included.

    Whole if `integer`, on a log scale if `log`. With a `step` its values are low, low + step, …,
    high.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"{self} is empty: the lower bound must be below the upper one")
        if self.log and self.low <= 0:
            raise ValueError(f"{self} is on a log scale, so its lower bound must be above 0")
        if self.log and self.step is not None:
            raise ValueError(f"{self}: a log scale takes no step")

    def __contains__(self, value: Scalar) -> bool:
        # True is an int in Python
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and self.snap(value) == value

    def snap(self, value: Scalar) -> Scalar:
        """Return the nearest value of the domain, without the rounding errors of low + n * step."""
        assert isinstance(value, int | float)
        if self.step is not None:
            low, step = _exact(self.low), _exact(self.step)
            value = float(low + step * round((_exact(value) - low) / step))
        return round(value) if self.integer else value

    def probes(self) -> tuple[Scalar, ...]:
        """Return the bounds, and for real numbers a value between them that is not whole."""
        if self.integer or self.step is not None:
            return self.low, self.high
        # 0.382 is no round fraction, so the probe is not a whole number by accident.
        return self.low, self.high, self.low + 0.382 * (self.high - self.low)

    def steps(self) -> tuple[Scalar, ...]:
        """Return every value of a stepped interval, in order."""
        assert self.step is not None
        return tuple(self.snap(self.low + index * self.step) for index in range(self.count))

    @property
    def count(self) -> int:
        """Number of values of a stepped interval."""
        assert self.step is not None
        return round((self.high - self.low) / self.step) + 1

    def __str__(self) -> str:
        if self.step is not None:
            stop = _exact(self.high) + _exact(self.step)
            stop_text = str(int(stop)) if self.integer else repr(float(stop))
            return f"range({self.low}, {stop_text}, {self.step})"
        text = f"interval({self.low}, {self.high})"
        text = f"int({text})" if self.integer else text
        return f"tag(log, {text})" if self.log else text


@dataclass(frozen=True)
class Branch:
    """The consequences of one choice of `Branches`: fixed values, and a space to search."""

    fixed: Point
    space: Space

    def __str__(self) -> str:
        entries = [f"{key}: {word(value)}" for key, value in self.fixed.items()]
        entries += [f"{key}: {domain}" for key, domain in self.space.items()]
        return f"{{{', '.join(entries)}}}"


@dataclass(frozen=True)
class Branches:
    """A choice whose values have keys of their own, searched only if that value is drawn.

    With `label` the key is no setting, only a name for the choice.
    """

    branches: Mapping[Scalar, Branch]
    label: bool = False

    @property
    def choice(self) -> Choice:
        """The choice between the branches."""
        return Choice(tuple(self.branches))

    def __str__(self) -> str:
        entries = [f"{word(value)}: {branch}" for value, branch in self.branches.items()]
        return f"{{{', '.join(entries)}}}"


Domain = Choice | Interval
Space = dict[str, Domain | Branches]


def word(value: Scalar) -> str:
    """Format a value so that Hydra's grammar reads it back. Override texts of lists pass unchanged."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str() if not value.startswith(("[", "{")) and not _is_plain(value):
            return _quote(value)
        case _:
            return str(value)


def _is_plain(text: str) -> bool:
    """Return True if Hydra reads a bare text as that text, not as a number, a boolean or grammar."""
    known = text.lower() in ("true", "false", "null", "nan", "inf", "infinity")
    return re.fullmatch(r"[A-Za-z][\w./@-]*", text) is not None and not known


def _quote(text: str) -> str:
    """Quote a text for Hydra: backslashes are doubled only before a quote and at the end."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - tail :]}'"


def walk(space: Space, value_of: Callable[[str, Domain], Scalar], way: str = "") -> Point:
    """Return the point that results if `value_of(parameter, domain)` decides every parameter."""
    point: Point = {}
    for key, domain in space.items():
        name = way + key
        if isinstance(domain, Branches):
            value = value_of(name, domain.choice)
            branch = domain.branches[value]
            point |= branch.fixed if domain.label else {key: value, **branch.fixed}
            point |= walk(branch.space, value_of, _way(name, value))
        else:
            point[key] = domain.snap(value_of(name, domain))
    return point


def locate(space: Space, point: Mapping[str, Scalar], way: str = "") -> Draw | None:
    """Return the draw that leads to a (possibly partial) point, or None if the point is outside.

    If several branches fit, the one that decides most of the point's keys and adds fewest others is
    taken. A label may be part of the point.
    """
    draw: Draw = {}
    for key, domain in space.items():
        found = _locate(way + key, key, domain, point)
        if found is None:
            return None
        draw |= found
    return draw


def _locate(
    name: str, key: str, domain: Domain | Branches, point: Mapping[str, Scalar]
) -> Draw | None:
    if not isinstance(domain, Branches):
        if key not in point:
            return {}
        return {name: point[key]} if point[key] in domain else None
    named = keys({key: domain}, labels=True) & set(point)
    if not named:
        return {}

    def distance(item: tuple[Scalar, Branch]) -> tuple[int, int]:
        """Return the number of the point's keys that a branch leaves out, and of the keys that it
        adds.
        """
        own = {*item[1].fixed, *keys(item[1].space, labels=True)}
        return len(named - {key, *own}), len(own - named)

    for value, branch in sorted(domain.branches.items(), key=distance):
        wanted = {key: value, **branch.fixed}
        if all(point.get(part, fixed) == fixed for part, fixed in wanted.items()):
            inner = locate(branch.space, point, _way(name, value))
            if inner is not None:
                return {name: value, **inner}
    return None


def keys(space: Space, labels: bool = False) -> set[str]:
    """Return every setting that a point of the space may decide. With `labels`, the labels too."""
    found: set[str] = set()
    for key, domain in space.items():
        if isinstance(domain, Branches):
            for branch in domain.branches.values():
                found |= set(branch.fixed) | keys(branch.space, labels)
        if labels or not (isinstance(domain, Branches) and domain.label):
            found.add(key)
    return found


def always_decided(space: Space) -> set[str]:
    """Return the settings that every point of the space decides, whichever branches it takes."""
    found: set[str] = set()
    for key, domain in space.items():
        if isinstance(domain, Branches):
            each = [
                {*branch.fixed, *always_decided(branch.space)}
                for branch in domain.branches.values()
            ]
            found |= set.intersection(*each)
        if not (isinstance(domain, Branches) and domain.label):
            found.add(key)
    return found


def conditional(space: Space) -> bool:
    """Return True if the set of parameters depends on drawn values."""
    return any(isinstance(domain, Branches) for domain in space.values())


def decided_twice(space: Space) -> set[str]:
    """Return the keys that stand both in a branch and outside it, which makes their value ambiguous."""
    twice: set[str] = set()
    seen: set[str] = set()
    for key, domain in space.items():
        here = keys({key: domain})
        twice |= here & seen
        seen |= here
        if isinstance(domain, Branches):
            for branch in domain.branches.values():
                inside = keys(branch.space)
                twice |= ({key, *branch.fixed} & inside) | decided_twice(branch.space)
                twice |= {key} & set(branch.fixed)
    return twice


def probes(space: Space) -> Iterator[Point]:
    """Yield points until every probe value of every domain, in every branch, has appeared."""
    columns = [list(_probe_column(key, domain)) for key, domain in space.items()]
    for row in itertools.zip_longest(*columns):
        yield {key: value for cell in row if cell is not None for key, value in cell.items()}


def _probe_column(key: str, domain: Domain | Branches) -> Iterator[Point]:
    if not isinstance(domain, Branches):
        yield from ({key: value} for value in domain.probes())
        return
    for value, branch in domain.branches.items():
        own = branch.fixed if domain.label else {key: value, **branch.fixed}
        yield from ({**own, **inner} for inner in (list(probes(branch.space)) or [{}]))


def grid(space: Space, way: str = "") -> Iterator[Draw]:
    """Yield every combination, the last key varying fastest.

    Raises:
        ValueError: the space has an interval without steps, or more values than MAX_VALUES.
    """
    columns = [list(_grid_column(way + key, domain)) for key, domain in space.items()]
    for row in itertools.product(*columns):
        yield {name: value for cell in row for name, value in cell.items()}


def _grid_column(name: str, domain: Domain | Branches) -> Iterator[Draw]:
    if isinstance(domain, Branches):
        for value, branch in domain.branches.items():
            yield from ({name: value, **inner} for inner in grid(branch.space, _way(name, value)))
        return
    if isinstance(domain, Interval) and domain.step is None:
        raise ValueError(
            f"{name}={domain}: sampler=grid needs choice(...) or range(start, stop, step)"
        )
    if isinstance(domain, Interval) and domain.count > MAX_VALUES:
        raise ValueError(
            f"{name}={domain}: {domain.count:,} values are no grid (at most {MAX_VALUES:,}). "
            "Use larger steps or another sampler"
        )
    values = domain.steps() if isinstance(domain, Interval) else domain.values
    yield from ({name: value} for value in values)


def _way(name: str, value: Scalar) -> str:
    return f"{name}={word(value)}/"


def _exact(value: float) -> Decimal:
    """Return the decimal number that was written, not the nearest binary one."""
    return Decimal(repr(value))
