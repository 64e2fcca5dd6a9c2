"""What a search space is made of: domains, and the checks that need no model.

Knows neither Hydra (sweeper.compose parses the words) nor Optuna (sweeper.search draws from them).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Scalar = str | int | float | bool | None
Point = dict[str, Scalar]
"""One value per searched key; a list is written as its override text, e.g. "[q_proj,v_proj]"."""


@dataclass(frozen=True)
class Choice:
    """One of a few values, without an order."""

    values: tuple[Scalar, ...]

    def __contains__(self, value: Scalar) -> bool:
        return value in self.values

    def probes(self) -> tuple[Scalar, ...]:
        """Values whose validity stands for the whole domain's: here all of them."""
        return self.values

    def __str__(self) -> str:
        return f"choice({', '.join(map(str, self.values))})"


@dataclass(frozen=True)
class Interval:
    """A number between low and high, both included; whole if `integer`; on a log scale if `log`."""

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
        return isinstance(value, int | float) and self.low <= value <= self.high

    def probes(self) -> tuple[Scalar, ...]:
        """The two bounds, and for real numbers one in between that is not whole."""
        if self.integer or self.step is not None:
            return self.low, self.high
        return self.low, self.high, self.low + 0.382 * (self.high - self.low)

    def __str__(self) -> str:
        step = "" if self.step is None else f", step={self.step}"
        text = f"interval({self.low}, {self.high}{step})"
        text = f"int({text})" if self.integer else text
        return f"tag(log, {text})" if self.log else text


Domain = Choice | Interval
Space = dict[str, Domain]


def grid(space: Mapping[str, Domain]) -> Iterator[Point]:
    """Every combination, the last key varying fastest.

    Raises:
        ValueError: an interval without steps has no grid.
    """
    values = [_grid_values(key, domain) for key, domain in space.items()]
    return (dict(zip(space, point, strict=True)) for point in itertools.product(*values))


def _grid_values(key: str, domain: Domain) -> tuple[Scalar, ...]:
    if isinstance(domain, Choice):
        return domain.values
    if domain.step is None:
        raise ValueError(
            f"{key}={domain}: sampler=grid needs choice(...) or range(start, stop, step)"
        )
    count = round((domain.high - domain.low) / domain.step) + 1
    values = (domain.low + index * domain.step for index in range(count))
    return tuple(int(value) if domain.integer else value for value in values)
