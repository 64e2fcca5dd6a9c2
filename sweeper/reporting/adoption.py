"""What keeps an adopted model from being a fair baseline: reasons, in words.

An earlier run stands in for an arm's own search; what is not known of it is said, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sweeper.outcome import Adopted
from sweeper.reporting.results import ArmResult
from sweeper.settings import Fairness

RATE = "training.learning_rate"
OUTER = 0.1
"""Share of a range's logarithm at either end within which a best rate says: look further."""


def strangeness(arm: ArmResult, rule: Fairness) -> Iterator[str]:
    """Each reason as what is said of the arm; none for an arm that was searched here."""
    adopted = arm.adopted
    if adopted is None:
        return
    if adopted.data_digest is None:
        yield "does not say on which data it was trained, so it may have seen rows that judge it"
    elif adopted.data_digest != arm.facts.data_digest:
        yield "was trained on other data or splits, so it may have seen rows that judge it"
    if adopted.base_digest is None:
        yield "does not say from which base it started"
    elif adopted.base_digest != arm.facts.base_digest:
        yield "started from another base"
    yield from _doubtful_search(arm, adopted, rule)


def place_in_range(rate: float, low: float, high: float) -> float:
    """Where a rate lies in a range's logarithm, from 0 to 1."""
    return math.log(rate / low) / math.log(high / low)


def _doubtful_search(arm: ArmResult, adopted: Adopted, rule: Fairness) -> Iterator[str]:
    rates, rate = adopted.rates, arm.settings.get(RATE)
    if len(rates) < max(rule.min_finished, 2) or rate is None:
        known = f"a search of {len(rates)} learning rates" if rates else "no search"
        yield (
            f"has {known} behind it that is known, and fairness.min_finished={rule.min_finished} asks "
            "for more"
        )
    elif rate != adopted.best_rate:
        yield f"has another learning rate ({rate:.3g}) than its search found best"
    elif not OUTER <= place_in_range(rate, rates[0], rates[-1]) <= 1 - OUTER:
        yield (
            f"has its learning rate ({rate:.3g}) in the outer tenth of what its search tried "
            f"({rates[0]:.3g} to {rates[-1]:.3g})"
        )
