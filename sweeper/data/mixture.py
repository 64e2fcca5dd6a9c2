"""Shape the training split: shares of sources or tasks, how many rows, and in which order.

Runs after the split, on train only, so that no repeated row can stand on both sides. Knows columns and
lengths, no tokens.
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
"""The word in `order_by` that means the characters of an example rather than a column."""


def shape(
    pools: Sequence[Sequence[Example]], weights: Sequence[float] | None, data: DataSettings
) -> list[Example]:
    """The training rows: mixed, limited, ordered.

    Args:
        pools: train of every source.
        weights: share of each source; None = all rows as they are.
        data: max_samples, balance_by, order_by, split_seed.

    Raises:
        DataError: a row lacks the column that is balanced or ordered by.
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
    """A row's value in a column that the configuration names under `data.<key>`.

    Raises:
        DataError: the row has no such column, or nothing in it.
    """
    if (value := example.row.values.get(name)) is None:
        raise DataError(
            f"{example.row.where}: nothing in the column {name!r} (data.{key}); "
            f"its columns: {', '.join(example.row.values)}"
        )
    return value


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of the weights that sum to `total` (largest remainders)."""
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _mixed(
    pools: Sequence[Sequence[Example]], weights: Sequence[float], total: int, rng: random.Random
) -> list[Example]:
    """Each pool in its share: a sample of one that is too large, repeats of one that is too small."""
    mixed: list[Example] = []
    for pool, count in zip(pools, shares(weights, total), strict=True):
        if not pool:
            continue  # every row of it was left out: the ledger says why
        whole, rest = divmod(count, len(pool))
        mixed += [*pool] * whole + _in_order(pool, rng.sample(range(len(pool)), rest))
    rng.shuffle(mixed)
    return mixed


def _by_value(examples: Sequence[Example], name: str) -> dict[str, list[Example]]:
    found: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[str(column(example, name, "balance_by"))].append(example)
    return dict(sorted(found.items()))


def _in_order(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    return [examples[index] for index in sorted(indices)]


def _ordered(examples: Sequence[Example], name: str) -> list[Example]:
    """From the smallest value to the largest; numbers written as text count as numbers."""
    if name == BY_LENGTH:
        return sorted(examples, key=lambda example: len(example.text))
    texts = [str(column(example, name, "order_by")) for example in examples]
    try:
        values: Sequence[float | str] = [float(text) for text in texts]
    except ValueError:
        values = texts
    order = sorted(range(len(examples)), key=lambda index: values[index])
    return [examples[index] for index in order]
