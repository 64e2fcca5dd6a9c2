"""Reasons why an adopted model may be an unfair baseline.

An earlier MLflow run can replace an arm's own search. Everything that its record leaves open becomes a
doubt, because an assumption in its favour would decide the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sweeper.config.settings import FairnessRules
from sweeper.core.outcome import BaselineRun
from sweeper.reporting.results import ArmResult
from sweeper.reporting.study_progress import format_scalar
from sweeper.reporting.text_table import counted

RATE = "training.learning_rate"
RENDERING = (
    "data.template",
    "data.train_on",
    "data.max_length",
    "data.over_length",
    "data.packing",
)
"""Settings that turn the same rows into different training examples."""
LENGTHS = ("training.max_steps", "training.num_train_epochs")
"""Settings of a training's length. The first one that is set decides."""
BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
OUTER = 0.1
"""Share of a range's logarithm at either end in which a best learning rate asks for a wider range."""


def baseline_doubts(arm: ArmResult, rule: FairnessRules) -> Iterator[str]:
    """Yield each doubt as a predicate of the arm, or nothing for an arm that this study searched."""
    adopted = arm.adopted
    if adopted is None:
        return
    # Data are compared by digest, because a path says nothing about its rows.
    if adopted.data_digest is None:
        yield "does not record its training data, so it may have seen this study's evaluation rows"
    elif adopted.data_digest != arm.facts.data_digest:
        yield "was trained on other data or splits, so it may have seen this study's evaluation rows"
    if adopted.base_digest is None:
        yield "does not record its base model"
    elif adopted.base_digest != arm.facts.base_digest:
        yield "started from another base model"
    yield from _other_training(arm, adopted)
    yield from _doubtful_search(arm, adopted, rule)


def place_in_range(rate: float, low: float, high: float) -> float:
    """Return the position of a learning rate in a range on a log scale, from 0 to 1."""
    return math.log(rate / low) / math.log(high / low)


def _other_training(arm: ArmResult, adopted: BaselineRun) -> Iterator[str]:
    """Yield the differences between the run's settings and those that this study would have used."""
    own, run = _conditions(arm.settings), _conditions(adopted.settings)
    for name in own:
        # Other examples, another length or another batch size make another training.
        if name in run and run[name] != own[name]:
            yield f"was trained with {run[name]}, not {own[name]}"
    if missing := [name for name in own if name not in run]:
        yield f"does not record its {', '.join(missing)}"


def _conditions(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return as text the settings that decide which and how many examples are seen, also per step."""
    known = {
        key: f"{key}={format_scalar(settings[key])}"
        for key in RENDERING
        if settings.get(key) is not None
    }
    for key in LENGTHS:
        if _is_positive(settings.get(key)):
            known["length"] = f"{key}={settings[key]:.10g}"
            break
    # Only the product matters: 8 x 2 and 4 x 4 are the same step.
    shares = [settings[key] for key in BATCH if _is_positive(settings.get(key))]
    if len(shares) == len(BATCH):
        known["effective batch"] = f"{math.prod(shares)} examples per step"
    return known


def _is_positive(value: Any) -> bool:
    # Runs of other programs may hold anything under these names: None, -1, auto.
    return isinstance(value, int | float) and value > 0


def _doubtful_search(arm: ArmResult, adopted: BaselineRun, rule: FairnessRules) -> Iterator[str]:
    rates, rate = adopted.rates, arm.trained_with.get(RATE)
    if len(rates) < max(rule.min_finished, 2) or rate is None:
        known = counted(len(rates), "learning rate") if rates else "no learning rate"
        yield (
            f"comes from a search with {known} on record, and "
            f"fairness.min_finished={rule.min_finished} asks for more"
        )
    elif rate != adopted.best_rate:
        yield f"has a learning rate ({rate:.3g}) that was not the best one of its search"
    elif not OUTER <= place_in_range(rate, rates[0], rates[-1]) <= 1 - OUTER:
        yield (
            f"has a learning rate ({rate:.3g}) in the outer tenth of the range that its search tried "
            f"({rates[0]:.3g} to {rates[-1]:.3g})"
        )
