"""The gain of a search over what was known before: an arm's winner against the arm's best recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sweeper.reporting.arm_comparison import ArmComparison

GainName = Literal["gained", "enough", "undecided"]


@dataclass(frozen=True)
class RecipeGain:
    """The comparison of an arm's winner with the best known point that the arm tried."""

    arm: str
    label: str
    recipe: str
    source: str
    """Where the recipe was read."""
    settled: bool
    """False while the answer is PROVISIONAL."""
    comparison: ArmComparison | None = None
    """None: the recipe itself is the winner, so nothing is compared."""
    failed_seeds: str = ""
    """How many of the recipe's seeds diverged or ran out of memory, or '' if none did."""

    @property
    def outcome(self) -> GainName:
        """The outcome: the search gained, the recipe was enough, or neither is shown."""
        found = self.comparison
        if not self.settled or (found is not None and found.outcome == "undecided"):
            return "undecided"
        gained = found is not None and found.outcome == "ahead" and found.better is found.side
        return "gained" if gained else "enough"
