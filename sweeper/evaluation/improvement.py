"""Base against tuned: how much better each metric became, in per cent of the base's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sweeper.config.settings import DIRECTIONS


@dataclass(frozen=True)
class Improvement:
    """One metric of the untuned and the tuned model, unrounded."""

    metric: str
    base: float
    tuned: float
    direction: str

    @property
    def percent(self) -> float | None:
        """Positive is better; None where the base's value is 0.

        From unrounded values: 0.2255 → 0.2849 gives 26.3 where the scores behind them gave 26.4.
        """
        if self.base == 0:
            return None
        gain = self.tuned - self.base if self.direction == "maximize" else self.base - self.tuned
        return 100 * gain / abs(self.base)


def improvements(
    base: Mapping[str, float],
    tuned: Mapping[str, float],
    directions: Mapping[str, str] = DIRECTIONS,
) -> list[Improvement]:
    """The metrics that both models have and whose better way is known, in the order of `directions`."""
    return [
        Improvement(name, base[name], tuned[name], direction)
        for name, direction in directions.items()
        if name in base and name in tuned
    ]


def as_markdown(rows: Sequence[Improvement]) -> str:
    """For people; rounded only here."""
    lines = ["| metric | base | tuned | improvement |", "|---|---:|---:|---:|"]
    for row in rows:
        percent = "–" if row.percent is None else f"{row.percent:+.1f} %"
        lines.append(f"| {row.metric} | {row.base:.4f} | {row.tuned:.4f} | {percent} |")
    return "\n".join(lines) + "\n"
