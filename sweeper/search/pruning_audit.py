"""How often the pruner was wrong, measured on trials that it wanted to stop and that went on.

A *wrong kill* is an audited trial whose final value is better than the median of the trials that
finished without being audited: it belonged to the better half after all. It is *costly* if it is
better than the best of them: pruning would have lost the answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sweeper.config.settings import Objective


@dataclass(frozen=True)
class PruningAudit:
    """How the audited trials of an arm ended."""

    audited: int
    wrong: int
    costly: int

    def __str__(self) -> str:
        return (
            "pruner audit: trials that went on although they would have been pruned: "
            f"{self.audited}; better in the end than the median of the others: {self.wrong} "
            f"({self.wrong / self.audited:.0%}), better than the best of them: {self.costly}"
        )


def audit(
    objective: Objective, finished: Sequence[float], audited: Sequence[float]
) -> PruningAudit | None:
    """Count wrong kills.

    Args:
        objective: says which values are better.
        finished: final values of the trials that finished and were not audited.
        audited: final values of the audited ones.

    Returns:
        None without trials on both sides to compare.
    """
    if not finished or not audited:
        return None
    median, best = statistics.median(finished), min(finished, key=objective.order)
    return PruningAudit(
        len(audited),
        sum(objective.gain(value, over=median) > 0 for value in audited),
        sum(objective.gain(value, over=best) > 0 for value in audited),
    )
