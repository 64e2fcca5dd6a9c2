"""A pruner that stops a trial far behind the best look, in units of the looks' own noise.

The difference between a last look and the end of its trial varies from trial to trial. This spread is
the known error of looks: of the fixed rows that they are taken from, of the rest of the schedule, and of
the seed's part in both. A gap in nats would be a constant of one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from sweeper.search.telling import feasible, is_measured

NORMAL = 1.4826
"""Standard deviation of a normal distribution, in median distances from its median."""
FEWEST = 3
"""Fewest trials that ran to their end from which noise is estimated."""


class GapPruner(BasePruner):
    """Stops a trial whose look is worse than the best one at the same place by several noises."""

    def __init__(self, n_startup_trials: int, noises: float) -> None:
        """
        Args:
            n_startup_trials: number of trials that run to their end before any is stopped.
            noises: the gap in standard deviations of the noise.
        """
        if not noises > 0:
            raise ValueError(f"noises={noises}: the gap must be above 0")
        self._startup = max(n_startup_trials, FEWEST)
        self._noises = noises

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """See BasePruner."""
        place = trial.last_step
        if place is None:
            return False
        trials = study.get_trials(deepcopy=False)
        others = [other for other in trials if other.number != trial.number and feasible(other)]
        looks = [
            other.intermediate_values[place]
            for other in others
            if place in other.intermediate_values
        ]
        differences = last_differences(others)
        if not looks or len(differences) < self._startup:
            return False
        own = trial.intermediate_values[place]
        maximize = study.direction is StudyDirection.MAXIMIZE
        behind = max(looks) - own if maximize else own - min(looks)
        return behind > self._noises * usual_spread(differences)


def last_differences(trials: Sequence[FrozenTrial]) -> list[float]:
    """Return by how much the value of each trial differs from its last look.

    Only looks at the latest place of all count: earlier ones differ by what training still gains.
    """
    ended = [trial for trial in trials if is_measured(trial) and trial.intermediate_values]
    latest = max((max(trial.intermediate_values) for trial in ended), default=0)
    return [
        trial.values[0] - trial.intermediate_values[latest]
        for trial in ended
        if latest in trial.intermediate_values
    ]


def usual_spread(values: Sequence[float]) -> float:
    """Return the standard deviation of values, a few of which may lie far from all others."""
    # after a rate that is far too high, the last look and the end differ by much more than noise
    middle = median(values)
    return NORMAL * median(abs(value - middle) for value in values)
