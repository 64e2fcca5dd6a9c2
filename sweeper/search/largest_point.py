"""The largest trials of an arm: its highest rank, widest target set and longest rows together.

Knows no model. Which target set is the widest depends on the base, so every candidate has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sweeper.config.settings import TrialSettings
from sweeper.config.space import (
    Branch,
    Branches,
    Choice,
    Domain,
    Interval,
    Scalar,
    Space,
    grid,
    walk,
)
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import ArmPlan

SIZE_KEYS = (
    "data.max_length",
    "training.per_device_train_batch_size",
    "adapter.r",
    "adapter.trainable_parameters",
)
"""Settings by which a trial grows."""
TARGETS = "adapter.target_modules"
MOST_DRAWS = 4096
"""Draws of the reduced space that are looked at, so that a space of many choices costs no minutes."""


def largest_trials(arm: ArmPlan) -> list[TrialSettings]:
    """Return the largest admissible trial of an arm for each target set, branch and group choice.

    A combination that the settings refuse is replaced by the next smaller one.
    """
    found: dict[tuple[Scalar, ...], TrialSettings] = {}
    reduced = _reduced(arm.space)
    for draw in itertools.islice(grid(reduced), MOST_DRAWS):
        kind = tuple(value for name, value in draw.items() if not _is_size(name))
        if kind in found:
            continue
        try:
            found[kind] = arm.settings_at(walk(reduced, lambda name, _: draw[name])).trial  # noqa: B023
        except ConfigError:
            continue
    return list(found.values())


def _is_size(parameter: str) -> bool:
    return parameter.rpartition("/")[2] in SIZE_KEYS


def _reduced(space: Space) -> Space:
    """Return a space with the values that decide a trial's size, the largest ones first."""
    return {key: _reduced_domain(key, domain) for key, domain in space.items()}


def _reduced_domain(key: str, domain: Domain | Branches) -> Domain | Branches:
    if isinstance(domain, Branches):
        branches = {
            value: Branch(branch.fixed, _reduced(branch.space))
            for value, branch in domain.branches.items()
        }
        return Branches(branches, domain.label)
    if key in SIZE_KEYS:
        return Choice(tuple(_descending(domain)))
    # a key without a dot chooses a group of conf/, which may change anything
    if isinstance(domain, Choice) and (key == TARGETS or "." not in key):
        return domain
    # any one value will do where the size does not depend on it
    return Choice(domain.probes()[:1])


def _descending(domain: Domain) -> Iterator[Scalar]:
    """Yield the values of a size, the largest first. `auto` and other words come last."""
    if isinstance(domain, Interval):
        ends = domain.steps() if domain.step is not None else domain.probes()[:2]
        yield from sorted(ends, key=_size, reverse=True)
        return
    yield from sorted(domain.values, key=_size, reverse=True)


def _size(value: Scalar) -> float:
    return float(value) if isinstance(value, int | float) else float("-inf")
