"""The points of the bank of curves, in the order in which they are trained.

A bank is made in several sessions, and an incomplete one must be usable. Every beginning of the order
therefore covers the space: a pass of the factorial has each combination of rank, alpha and target
modules once, and the rates of successive passes bisect those of the passes before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Point = dict[str, float | int | str]
"""One value for each searched setting."""

RATE, RANK, RATIO = "training.learning_rate", "adapter.r", "adapter.alpha_over_r"
TARGETS, WARMUP = "adapter.target_modules", "training.warmup_ratio"


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return numbers at equal distances on a log scale, both ends included, of six digits each."""
    steps = (index / (count - 1) for index in range(count))
    return tuple(float(f"{low * (high / low) ** step:.6g}") for step in steps)


RATES = log_spaced(3e-4, 3e-2, 8)
RANKS = (2, 4, 8, 16, 32)
RATIOS = (0.5, 1.0, 2.0, 4.0)
MODULES = ("attention", "mlp", "all-linear")
FIXED_WARMUP = 0.03
"""Warm-up of the factorial: the product's default."""
CONTINUOUS = 60
"""Points between those of the factorial, which show how well anything interpolates."""
BISECTED = (0, 4, 2, 6, 1, 5, 3, 7)
"""Shifts of the eight rates in successive passes."""


def factorial(
    ranks: Sequence[int] = RANKS,
    ratios: Sequence[float] = RATIOS,
    modules: Sequence[str] = MODULES,
) -> Iterator[Point]:
    """Yield every combination once, the whole of ranks, ratios and modules in each pass."""
    combinations = list(itertools.product(ranks, ratios, modules))
    count = len(combinations)
    # coprime to the number of combinations, so that each is visited, and neighbours lie far apart
    strides = range(int(0.382 * count) + 1, 2 * count)
    stride = next(step for step in strides if math.gcd(step, count) == 1)
    for shift in BISECTED:
        for place in range(count):
            chosen = place * stride % count
            rank, ratio, module = combinations[chosen]
            # three is coprime to eight: the combinations of a pass have all rates equally often
            rate = RATES[(3 * chosen + shift) % len(RATES)]
            yield _point(rate, rank, ratio, module, FIXED_WARMUP)


def continuous(count: int = CONTINUOUS) -> Iterator[Point]:
    """Yield points of a low-discrepancy sequence over all five settings."""
    for rate, rank, ratio, module, warmup in itertools.islice(_kronecker(5), count):
        yield _point(
            float(f"{3e-4 * 100**rate:.6g}"),
            round(2 * 16**rank),
            float(f"{0.5 * 8**ratio:.4g}"),
            MODULES[int(3 * module)],
            round(0.1 * warmup, 5),
        )


def embedded_points() -> list[Point]:
    """Return the points of the first bank: a continuous one after every eight of the factorial."""
    between = continuous()
    found: list[Point] = []
    for number, point in enumerate(factorial(), start=1):
        found.append(point)
        if number % 8 == 0:
            found.append(next(between))
    return found


def held_out_points() -> list[Point]:
    """Return the 96 points of a held-out bank: fewer ranks, ratios and target sets, all rates."""
    return list(factorial(ranks=(2, 8, 32), ratios=(1.0, 4.0), modules=("attention", "all-linear")))


def is_factorial(point: Point) -> bool:
    """Return True if a point is one of the first bank's factorial."""
    levels = {RATE: RATES, RANK: RANKS, RATIO: RATIOS, TARGETS: MODULES, WARMUP: (FIXED_WARMUP,)}
    return all(point[key] in values for key, values in levels.items())


def _point(rate: float, rank: int, ratio: float, module: str, warmup: float) -> Point:
    return {RATE: rate, RANK: rank, RATIO: ratio, TARGETS: module, WARMUP: warmup}


def _kronecker(dimensions: int) -> Iterator[tuple[float, ...]]:
    """Yield multiples of powers of the generalised golden ratio, modulo 1 (Roberts 2018)."""
    ratio = 1.0
    for _ in range(100):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    for index in itertools.count(1):
        yield tuple((0.5 + index * ratio**-axis) % 1 for axis in range(1, dimensions + 1))
