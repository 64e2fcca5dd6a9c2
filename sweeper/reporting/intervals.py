"""How sure a difference between two models is, when both were judged on the same examples.

A loss here is token-weighted: sum of negative log-likelihood over sum of target tokens, a ratio of two
sums over examples. Knows per-example figures and seeds; not where they come from, and no study.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sweeper.core.value import FrozenValue

LEVEL = 0.95
RESAMPLES = 4000
"""The ends of a 95 % interval then move by about 3 % of its width between random states."""
CHUNK = 2**22
"""Resampled counts held in memory at a time."""

Floats = NDArray[np.float64]


class IntervalEstimate(FrozenValue):
    """A figure with its interval; without an interval where nothing can be said about it."""

    value: float
    low: float | None = None
    high: float | None = None

    def has(self, value: float) -> bool:
        """Whether a value lies in the interval; never without an interval."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


class ArmContrast(FrozenValue):
    """One arm against a reference, on one split."""

    arm: str
    reference: str
    split: str
    examples: int
    seeds: tuple[int, int]
    """How many seeds of the arm and of the reference; with one, its spread is not in the interval."""
    losses: tuple[float, float]
    """Mean over seeds of the arm and of the reference, in nats per target token."""
    base_loss: float
    """The untuned base, the zero line of both."""
    difference: IntervalEstimate
    """Loss of the arm minus loss of the reference, in nats: below zero, the arm is ahead."""
    retained: IntervalEstimate | None
    """The arm's improvement over the base in % of the reference's; None if that has none."""
    noise: tuple[float | None, float | None]
    """Standard deviation over seeds of the arm's and of the reference's loss."""


@dataclass(frozen=True)
class SeedLosses:
    """One configuration, trained with several seeds, judged on the examples of one split.

    `nll`: [seeds, examples], the summed negative log-likelihood of each example's target tokens in nats.
    `tokens`: [examples], how many target tokens that sum is over.
    """

    nll: Floats
    tokens: Floats

    def __post_init__(self) -> None:
        if self.nll.ndim != 2 or self.tokens.shape != self.nll.shape[1:] or self.nll.size == 0:
            raise ValueError(
                f"nll is [seeds, examples] and tokens [examples]; got {self.nll.shape} "
                f"and {self.tokens.shape}"
            )
        if not (np.isfinite(self.nll).all() and (self.tokens > 0).all()):
            raise ValueError("every nll must be finite, and every example needs a target token")

    @property
    def losses(self) -> Floats:
        """[seeds]: nats per target token."""
        losses: Floats = self.nll.sum(axis=1) / self.tokens.sum()
        return losses

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return float(self.losses.mean())


def noise_floor(losses: Floats) -> float | None:
    """Standard deviation (n - 1) of one configuration's losses over seeds; None for one seed."""
    return float(losses.std(ddof=1)) if losses.size > 1 else None


def contrast(
    names: tuple[str, str],
    arm: SeedLosses,
    reference: SeedLosses,
    base: SeedLosses,
    split: str = "test",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> ArmContrast:
    """Compare two arms on the same examples.

    The interval is a paired, hierarchical bootstrap: a resample draws examples with replacement, the
    same ones for both arms, the base and all seeds, and then seeds within each arm. Two corrections
    make it hold for a handful of seeds, where the plain bootstrap covers 73 % instead of 95 %
    (two seeds) and 83 % (three): n - 1 of n seeds are drawn, which makes their variance unbiased
    (Rao and Wu 1988), and deviations are stretched by Student's t over the normal quantile at
    Satterthwaite's degrees of freedom (Hesterberg 2015, arXiv:1411.5279, section 4).

    Args:
        names: of the arm and of the reference.
        arm: judged on the examples of `split`.
        reference: judged on the same examples, in the same order.
        base: the untuned base on them, one row.
        split: which one, for the record.
        seed: of the resampling.
        resamples: how many; the default costs about 0.2 s for 300 examples.

    Raises:
        ValueError: the three were not judged on the same examples.
    """
    if not (
        np.array_equal(arm.tokens, reference.tokens) and np.array_equal(arm.tokens, base.tokens)
    ):
        raise ValueError(f"{names[0]}, {names[1]} and the base were judged on different examples")
    draws = _stretched(_draws((arm, reference, base), seed, resamples), arm, reference)
    value = arm.loss - reference.loss
    return ArmContrast(
        arm=names[0],
        reference=names[1],
        split=split,
        examples=arm.tokens.size,
        seeds=(arm.losses.size, reference.losses.size),
        losses=(arm.loss, reference.loss),
        base_loss=base.loss,
        difference=_estimate(value, draws[0] - draws[1]),
        retained=_retained(arm.loss, reference.loss, base.loss, draws),
        noise=(noise_floor(arm.losses), noise_floor(reference.losses)),
    )


def _estimate(value: float, draws: Floats) -> IntervalEstimate:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return IntervalEstimate(value=value, low=float(low), high=float(high))


def _retained(arm: float, reference: float, base: float, draws: Floats) -> IntervalEstimate | None:
    """Improvement over the base in % of the reference's; without an interval if that may be zero."""
    gain = base - reference
    if gain <= 0:
        return None
    value = 100 * (base - arm) / gain
    gains = draws[2] - draws[1]
    if np.quantile(gains, (1 - LEVEL) / 2) <= 0:  # a ratio whose denominator may vanish has no ends
        return IntervalEstimate(value=value)
    with np.errstate(divide="ignore"):  # the few draws beyond that quantile cannot be its ends
        return _estimate(value, 100 * (draws[2] - draws[0]) / gains)


def _draws(judged: tuple[SeedLosses, ...], seed: int, resamples: int) -> Floats:
    """[models, resamples]: each model's mean loss in each resample."""
    random = np.random.default_rng(seed)
    tokens = judged[0].tokens
    nll = np.concatenate([one.nll for one in judged])
    parts = [
        count @ nll.T / (count @ tokens)[:, None]
        for count in _counts(tokens.size, resamples, random)
    ]
    losses = np.concatenate(parts)
    ends = np.cumsum([len(one.nll) for one in judged])[:-1]
    return np.stack([_seed_means(block, random) for block in np.split(losses, ends, axis=1)])


def _counts(examples: int, resamples: int, random: np.random.Generator) -> Iterator[Floats]:
    """Chunks [some resamples, examples]: how often each example was drawn."""
    size = max(1, CHUNK // examples)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        chances = np.full(examples, 1 / examples)
        yield random.multinomial(examples, chances, size=rows).astype(np.float64)


def _seed_means(losses: Floats, random: np.random.Generator) -> Floats:
    """[resamples]: the mean over n - 1 seeds drawn with replacement from n; the only one if n = 1."""
    resamples, seeds = losses.shape
    if seeds == 1:
        return losses[:, 0]
    drawn = random.integers(0, seeds, (resamples, seeds - 1))
    means: Floats = np.take_along_axis(losses, drawn, axis=1).mean(axis=1)
    return means


def _stretched(draws: Floats, arm: SeedLosses, reference: SeedLosses) -> Floats:
    """Draws with their deviations from the estimates widened from the normal's to Student's t."""
    from scipy import stats  # half a second, and only at a study's end

    variances = [one.losses.var(ddof=1) / n for one in (arm, reference) if (n := len(one.nll)) > 1]
    freedoms = [len(one.nll) - 1 for one in (arm, reference) if len(one.nll) > 1]
    of_all = float((draws[0] - draws[1]).var())
    of_examples = max(of_all - sum(variances), 0.0)
    terms = [*zip(variances, freedoms, strict=True), (of_examples, max(arm.tokens.size - 1, 1))]
    spread = sum(variance**2 / freedom for variance, freedom in terms)
    if spread == 0:
        return draws
    freedom = sum(variance for variance, _ in terms) ** 2 / spread
    tail = (1 + LEVEL) / 2
    stretch = stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    centre = draws.mean(axis=1, keepdims=True)
    stretched: Floats = centre + stretch * (draws - centre)
    return stretched
