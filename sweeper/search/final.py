"""How an arm ended: its finalists over their seeds, the winner, and what it lost on the test split.

Plain values; how they come about is in `finalists`, what is said about them in reporting.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from sweeper.folders import StudyFolder
from sweeper.outcome import Cause, Examples, Outcome, Value, device_seconds

COMPLETE: tuple[Cause, ...] = ("finished", "early_stopped")


class Repeat(Value):
    """A configuration trained with one seed; the trial of the search itself is the first."""

    seed: int
    outcome: Outcome | None
    """None if it was not trained (the budget)."""

    @property
    def value(self) -> float | None:
        """The objective's value on the validation split, if it was trained to its own end."""
        if self.outcome is None or self.outcome.cause not in COMPLETE:
            return None
        return self.outcome.best_value


class Finalist(Value):
    """A configuration of an arm over its seeds."""

    number: int
    """Of the trial in which the search tried it."""
    repeats: tuple[Repeat, ...]

    @property
    def values(self) -> list[float]:
        """The objective's value of each seed that came to its own end."""
        return [repeat.value for repeat in self.repeats if repeat.value is not None]

    @property
    def mean(self) -> float:
        """Over those seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation (n - 1) over those seeds; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Final(Value):
    """How an arm's finalists did."""

    finalists: tuple[Finalist, ...]
    winner: int
    """Number of the finalist with the best mean on the validation split."""
    test_losses: dict[int, float] = Field(default_factory=dict)
    """Of the winner on the test split, by seed, in nats per target token."""
    untuned_test_loss: float | None = None
    """Of the base, as the winner's trials hold it."""

    @property
    def test_loss(self) -> float | None:
        """Mean over the winner's seeds."""
        return statistics.fmean(self.test_losses.values()) if self.test_losses else None


@dataclass(frozen=True)
class ArmFinal:
    """An arm's end, and what its winner lost on each example of the test split."""

    final: Final
    seeds: Mapping[int, Examples] = field(default_factory=dict)
    untuned: Examples | None = None


def choose(finalists: Sequence[Finalist], direction: str) -> int:
    """The winner's number: the best mean among those of which the fewest seeds failed."""
    sign = 1.0 if direction == "minimize" else -1.0

    def order(finalist: Finalist) -> tuple[int, float]:
        failed = len(finalist.repeats) - len(finalist.values)
        return failed, sign * finalist.mean

    return min(finalists, key=order).number


def finalists_seconds(folder: StudyFolder, arm: str) -> float:
    """Device time of an arm's further seeds so far, from their folders."""
    outcomes = (
        Outcome.model_validate_json(path.read_text(encoding="utf-8"))
        for path in folder.finalists(arm).glob("trial_*/outcome.json")
    )
    return math.fsum(device_seconds(outcome.metrics) for outcome in outcomes)
