"""The pruner's error rate, measured on trials that ran on although the pruner would have stopped them.

A *wrong kill* is an audited trial whose final value is better than the median of the trials that
finished without an audit. It is *costly* if it is better than the best of them: pruning would have
lost the study's answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sweeper.config.settings import Objective


@dataclass(frozen=True)
class PruningAudit:
    """Final results of an arm's audited trials, counted."""

    audited: int
    wrong: int
    costly: int

    def __str__(self) -> str:
        return (
            f"pruner audit: {self.audited} trials that the pruner would have stopped ran to their end. "
            f"{self.wrong} of them ({self.wrong / self.audited:.0%}) beat the median of the others, "
            f"{self.costly} beat the best"
        )


def audit(
    objective: Objective, finished: Sequence[float], audited: Sequence[float]
) -> PruningAudit | None:
    """Count wrong kills.

    Args:
        objective: its direction says which values are better.
        finished: final values of the trials that finished and were not audited.
        audited: final values of the audited trials.

    Returns:
        None if either side is empty.
    """
    if not finished or not audited:
        return None
    median, best = statistics.median(finished), min(finished, key=objective.order)
    return PruningAudit(
        len(audited),
        sum(objective.gain(value, over=median) > 0 for value in audited),
        sum(objective.gain(value, over=best) > 0 for value in audited),
    )
