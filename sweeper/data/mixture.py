"""Sample, balance and order the rows of the training split.

Runs after the split and on train only, so that a repeated row cannot appear in two splits, and runs with
different data.max_samples are evaluated on the same rows. Works on columns and text lengths and does
not know tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from sweeper.config.settings import DataSettings
from sweeper.core.errors import DataError
from sweeper.data.examples import Example

BY_LENGTH = "length"
"""Value of data.order_by that orders by the characters of an example instead of by a column."""


def shape_train(
    pools: Sequence[Sequence[Example]], weights: Sequence[float] | None, data: DataSettings
) -> list[Example]:
    """Return the training rows mixed by weight, limited to data.max_samples, and ordered.

    Args:
        pools: Training examples of each source.
        weights: Relative share of each source, or None to take all rows as they are.
        data: Data settings: max_samples, balance_by, order_by and split_seed.

    Raises:
        DataError: A row lacks the column of data.balance_by or data.order_by.
    """
    rng = random.Random(data.split_seed)
    everything = [example for pool in pools for example in pool]
    total = min(data.max_samples or len(everything), len(everything))
    if data.balance_by is not None:
        pools = list(_by_value(everything, data.balance_by).values())
        weights = [1.0] * len(pools)
    if weights is not None:
        chosen = _mixed(pools, weights, total, rng)
    elif total < len(everything):
        chosen = _in_order(everything, rng.sample(range(len(everything)), total))
    else:
        chosen = everything
    return chosen if data.order_by is None else _ordered(chosen, data.order_by)


def column(example: Example, name: str, key: str) -> object:
    """Return a row's value in the column that the configuration names under `data.<key>`.

    Raises:
        DataError: The row has no such column, or no value in it.
    """
    if (value := example.row.values.get(name)) is None:
        raise DataError(
            f"{example.row.where}: no value in the column {name!r} (data.{key}={name}). "
            f"The row's columns are {', '.join(example.row.values)}."
        )
    return value


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers proportional to the weights (largest-remainder method)."""
    # Fractions are exact: with floats, equal weights could get different counts.
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _mixed(
    pools: Sequence[Sequence[Example]], weights: Sequence[float], total: int, rng: random.Random
) -> list[Example]:
    """Return each pool in its share: large pools are sampled, small pools are repeated."""
    mixed: list[Example] = []
    for pool, count in zip(pools, shares(weights, total), strict=True):
        if not pool:
            continue  # every row of this source was dropped, and `drops` holds the reasons
        whole, rest = divmod(count, len(pool))
        mixed += [*pool] * whole + _in_order(pool, rng.sample(range(len(pool)), rest))
    rng.shuffle(mixed)
    return mixed


def _by_value(examples: Sequence[Example], name: str) -> dict[str, list[Example]]:
    found: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[str(column(example, name, "balance_by"))].append(example)
    # Sorted: the draw must not depend on which value comes first
    return dict(sorted(found.items()))


def _in_order(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    return [examples[index] for index in sorted(indices)]


def _ordered(examples: Sequence[Example], name: str) -> list[Example]:
    """Return the examples in ascending order of a column. Numbers written as text sort as numbers."""
    if name == BY_LENGTH:
        return sorted(examples, key=lambda example: len(example.text))
    texts = [str(column(example, name, "order_by")) for example in examples]
    try:
        values: Sequence[float | str] = [float(text) for text in texts]
    except ValueError:  # one value that is not a number makes the whole column text
        values = texts
    order = sorted(range(len(examples)), key=lambda index: values[index])
    return [examples[index] for index in order]
