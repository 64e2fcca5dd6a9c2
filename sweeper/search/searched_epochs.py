"""Searched numbers of epochs: more of them for small data, and how long that makes a typical trial."""

from __future__ import annotations

import statistics
from dataclasses import replace

from sweeper.config import grammar
from sweeper.config.space import Choice, Interval
from sweeper.search.study_plan import EPOCHS, ArmPlan

FEW_ROWS = 2_000
"""Training rows below which one pass teaches little, and more passes do not overfit at once."""
MOST_EPOCHS = 5
FEW_ROWS_WORDS = (
    f"up to {MOST_EPOCHS} epochs, because there are fewer than {FEW_ROWS:,} training rows"
)


def with_few_rows(arm: ArmPlan, rows: int) -> ArmPlan:
    """Return the arm with more epochs to search if its data are small, else the arm itself.

    A range that the user has given, or that a stored study has, stays as it is.

    Args:
        arm: the arm.
        rows: rows of its training split.
    """
    domain = arm.space.get(EPOCHS)
    default = arm.settings.space.shared_params.get(EPOCHS)
    if not isinstance(domain, Interval) or default is None or rows >= FEW_ROWS:
        return arm
    if domain != grammar.parse_domain(EPOCHS, default):
        return arm
    longer = replace(domain, high=max(domain.high, MOST_EPOCHS))
    return replace(arm, space={**arm.space, EPOCHS: longer})


def mean_epochs(arm: ArmPlan) -> float:
    """Return the mean number of epochs over the range or choice of an arm, or the number that it has."""
    domain = arm.space.get(EPOCHS)
    if isinstance(domain, Interval):
        return (domain.low + domain.high) / 2
    if isinstance(domain, Choice):
        return statistics.fmean(float(value) for value in domain.values if value is not None)
    return arm.settings.training.num_train_epochs
