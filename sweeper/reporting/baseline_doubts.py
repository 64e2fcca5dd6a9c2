"""What keeps an adopted model from being a fair baseline: reasons, in words.

An earlier run stands in for an arm's own search; what is not known of it is said, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sweeper.config.settings import FairnessRules
from sweeper.core.outcome import BaselineRun
from sweeper.reporting.results import ArmResult
from sweeper.reporting.study_progress import format_scalar

RATE = "training.learning_rate"
RENDERING = (
    "data.template",
    "data.train_on",
    "data.max_length",
    "data.over_length",
    "data.packing",
)
"""Settings that make other training examples of the same rows."""
LENGTHS = ("training.max_steps", "training.num_train_epochs")
"""Of these the first that is set decides."""
BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
OUTER = 0.1
"""Share of a range's logarithm at either end within which a best rate says: look further."""


def strangeness(arm: ArmResult, rule: FairnessRules) -> Iterator[str]:
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
    yield from _other_training(arm, adopted)
    yield from _doubtful_search(arm, adopted, rule)


def place_in_range(rate: float, low: float, high: float) -> float:
    """Where a rate lies in a range's logarithm, from 0 to 1."""
    return math.log(rate / low) / math.log(high / low)


def _other_training(arm: ArmResult, adopted: BaselineRun) -> Iterator[str]:
    """Held against what this study would have trained the arm with."""
    own, run = _conditions(arm.settings), _conditions(adopted.settings)
    for name in own:
        if name in run and run[name] != own[name]:
            yield f"was trained with {run[name]}, not {own[name]}"
    if unsaid := [name for name in own if name not in run]:
        yield f"does not say with which {', '.join(unsaid)} it was trained"


def _conditions(settings: Mapping[str, Any]) -> dict[str, str]:
    """In words, what decides which examples a training sees, how many, and how many a step."""
    known = {
        key: f"{key}={format_scalar(settings[key])}"
        for key in RENDERING
        if settings.get(key) is not None
    }
    for key in LENGTHS:
        if _is_positive(settings.get(key)):
            known["length"] = f"{key}={settings[key]:.10g}"
            break
    shares = [settings[key] for key in BATCH if _is_positive(settings.get(key))]
    if len(shares) == len(BATCH):
        known["effective batch"] = f"{math.prod(shares)} examples a step"
    return known


def _is_positive(value: Any) -> bool:
    """Runs of other programs may say anything under these names: None, -1, auto."""
    return isinstance(value, int | float) and value > 0


def _doubtful_search(arm: ArmResult, adopted: BaselineRun, rule: FairnessRules) -> Iterator[str]:
    rates, rate = adopted.rates, arm.trained_with.get(RATE)
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
