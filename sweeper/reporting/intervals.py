"""Confidence intervals for the difference of two models that were judged on the same examples.

A loss here is token-weighted: the sum of negative log-likelihoods divided by the sum of target tokens,
both over examples. Any other per-example score is a sum over a weight in the same way. The module knows
per-example scores and seeds, and no study.

The means of arm, reference and base are asymptotically normal. Their covariance is the sum of two parts:
the examples, which all models share (so that the comparison is paired), and the seeds of each model.
benchmarks/verdict_calibration.py measures how often the intervals cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sweeper.core.outcome import ExampleLosses
from sweeper.core.value import EquivalenceMargin, FrozenValue

LEVEL = 0.95
POWER = 0.8
"""Probability with which a gap of the size that a study could have seen is found."""
# The next two were chosen by simulation, so that 95 to 97 of 100 intervals cover the truth
# and 88 to 93 of the shortest quarter (benchmarks/verdict_calibration.json).
CAUTION = 0.69
"""Factor on the degrees of freedom of seed variances. A handful of seeds is often too quiet by chance,
and exactly then an interval is short: without the factor the shortest quarter of intervals covers less.
"""
LEAST_SEED_SHARE = 1.2
"""Least ratio of the seeds' variance to the examples' with which degrees of freedom are counted, where a
single arm has all of the seeds' variance. Between arms of equal variance there is no such bound.
"""

ENDLESS = 1e9
"""Degrees of freedom at which Student's t is the normal distribution."""

Floats = NDArray[np.float64]


class IntervalEstimate(FrozenValue):
    """A figure with its 95 % interval. Both ends are None if no interval can be computed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> str:
        """The interval in words, with signs."""
        if self.low is None or self.high is None:
            return "no confidence interval, from a single example or group"
        return f"95 % interval {self.low:+.4f} to {self.high:+.4f}"

    def has(self, value: float) -> bool:
        """Return True if the interval contains a value, and False if there is no interval."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


class ArmContrast(FrozenValue):
    """The comparison of an arm with a reference on one split."""

    arm: str
    reference: str
    split: str
    examples: int
    seeds: tuple[int, int]
    """Number of seeds of the arm and of the reference. The spread over seeds needs at least two."""
    losses: tuple[float, float]
    """Loss of the arm and of the reference, as means over seeds in nats per target token. With another
    metric, its value."""
    base_loss: float
    """Loss of the untuned base, from which both improvements are counted."""
    difference: IntervalEstimate
    """Loss of the arm minus loss of the reference, in nats. Below zero the arm is better."""
    retained: IntervalEstimate | None
    """The arm's improvement over the base in % of the reference's, with Fieller's interval. None if the
    reference's improvement is not certain."""
    noise: tuple[float | None, float | None]
    """Standard deviation over seeds of the arm's and of the reference's loss, None for one seed."""
    metric: str = "eval/loss"
    """Metric that is compared."""
    standard_error: float | None = None
    """Standard error of the difference. None if there is a single example or group. None here and below:
    an earlier version stored the contrast."""
    freedom: float | None = None
    """Degrees of freedom of the standard error. None also if the error is zero or unknown."""
    seed_share: float | None = None
    """Share of the seeds in the variance of the difference. The rest is that of the examples."""
    p_value: float | None = None
    """Two-sided p value of no difference."""
    equivalence_p: float | None = None
    """The larger p value of the two one-sided tests for a difference within the margin. None: no margin
    was fixed."""
    fresh: bool = False
    """True if none of the seeds took part in the choice of the configurations."""
    groups: int | None = None
    """Number of groups of examples that were drawn as a whole. None: each example was its own."""
    changes: tuple[IntervalEstimate, IntervalEstimate] | None = None
    """Loss of the arm minus that of the untuned base, and the same for the reference. None: an earlier
    version stored the contrast."""


class SeedSpread(NamedTuple):
    """An estimate of the variance between seeds, with its degrees of freedom."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class SeedLosses:
    """Losses of one configuration, trained with several seeds, on the examples of one split.

    `nll` [seeds, examples] holds the summed negative log-likelihood of each example's target tokens in
    nats. `tokens` [examples] holds the number of those tokens. Scores of another metric stand in `nll`
    with their weights in `tokens`.
    """

    nll: Floats
    tokens: Floats
    groups: NDArray[np.int64] | None = None
    """Number of the group that each example belongs to, [examples]. None: each is its own."""
    further: SeedSpread | None = None
    """The spread over further seeds of the same arm, which were judged on another split."""

    def __post_init__(self) -> None:
        if self.nll.ndim != 2 or self.tokens.shape != self.nll.shape[1:] or self.nll.size == 0:
            raise ValueError(
                f"nll is [seeds, examples] and tokens [examples]. Got {self.nll.shape} "
                f"and {self.tokens.shape}"
            )
        if not (np.isfinite(self.nll).all() and (self.tokens > 0).all()):
            raise ValueError("every nll must be finite, and every example needs a target token")

    @property
    def losses(self) -> Floats:
        """Loss of each seed in nats per target token, [seeds]."""
        losses: Floats = self.nll.sum(axis=1) / self.tokens.sum()
        return losses

    @property
    def loss(self) -> float:
        """Mean loss over the seeds in nats per target token."""
        return float(self.losses.mean())

    @property
    def spread(self) -> SeedSpread | None:
        """Variance between seeds, pooled with that of the further seeds. None for a single seed."""
        count = len(self.nll)
        # A single seed may be an outlier in what it was trained on, so no other seeds stand in for it.
        if count == 1:
            return None
        own, freedom = float(self.losses.var(ddof=1)), count - 1
        if self.further is None:
            return SeedSpread(own, freedom)
        total = freedom + self.further.freedom
        pooled = (freedom * own + self.further.freedom * self.further.variance) / total
        return SeedSpread(pooled, total)


def noise_floor(losses: Floats) -> float | None:
    """Return the standard deviation (n - 1) of losses over seeds, or None for a single seed."""
    return float(losses.std(ddof=1)) if losses.size > 1 else None


def pooled_spread(values: Sequence[Sequence[float]]) -> SeedSpread | None:
    """Return the variance within several configurations over their seeds, or None without repeats."""
    repeated = [np.asarray(found) for found in values if len(found) > 1]
    freedom = sum(found.size - 1 for found in repeated)
    if not freedom:
        return None
    squares = sum(float(((found - found.mean()) ** 2).sum()) for found in repeated)
    return SeedSpread(squares / freedom, freedom)


@dataclass(frozen=True)
class LinearEstimate:
    """A weighted sum of the means of arm, reference and base, with its standard error."""

    value: float
    error: float
    """Standard error. Infinite if a single example or group leaves their spread unknown."""
    freedom: float
    """Degrees of freedom by Satterthwaite's rule."""
    seed_share: float

    def above(self, limit: float = 0.0) -> float:
        """Return the one-sided p value of a sum that is not above a limit."""
        from scipy import special  # see t_quantile

        if self.error == 0:
            return 0.0 if self.value > limit else 1.0
        return float(special.stdtr(self.freedom, (limit - self.value) / self.error))

    def two_sided(self) -> float:
        """Return the two-sided p value of a sum of zero."""
        # Equal models have no error either, and each of their one-sided p values is 1.
        if self.value == 0:
            return 1.0
        return 2 * min(self.above(), 1 - self.above(), 0.5)

    def half_width(self, level: float = LEVEL) -> float:
        """Return half the width of the two-sided interval of a level."""
        return self.error * t_quantile((1 + level) / 2, self.freedom)

    def interval(self) -> IntervalEstimate:
        """Return the value with its 95 % interval, or without one if the error is unknown."""
        if math.isinf(self.error):
            return IntervalEstimate(value=self.value)
        half = self.half_width()
        return IntervalEstimate(value=self.value, low=self.value - half, high=self.value + half)


def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t distribution."""
    from scipy import special  # the import takes time and is needed at a study's end only

    return float(special.stdtrit(freedom, probability))


@dataclass(frozen=True)
class JointMeans:
    """The means of several models on the same examples, with their covariance in parts."""

    means: Floats
    of_examples: Floats
    """Covariance of the means over examples, [models, models]."""
    example_freedom: int
    """Number of examples, or of groups of them, less one. At zero their spread is unknown."""
    of_seeds: tuple[SeedSpread | None, ...]
    """Variance of each model's mean over its seeds. None for a single seed."""

    @classmethod
    def of(cls, models: Sequence[SeedLosses]) -> JointMeans:
        """Return the means of models that were judged on the same examples."""
        tokens, groups = models[0].tokens, models[0].groups
        means = np.array([one.loss for one in models])
        sums = np.stack([one.nll.mean(axis=0) for one in models])
        # The mean of a ratio of sums varies as these residuals do (the delta method).
        residuals = sums - means[:, None] * tokens
        if groups is not None:
            numbers = np.unique(groups, return_inverse=True)[1]
            residuals = np.stack([np.bincount(numbers, weights=row) for row in residuals])
        count = residuals.shape[1]
        scale = count / max(count - 1, 1) / tokens.sum() ** 2
        spreads = [(one.spread, len(one.nll)) for one in models]
        of_seeds = tuple(
            None if found is None else SeedSpread(found.variance / seeds, found.freedom)
            for found, seeds in spreads
        )
        return cls(means, scale * residuals @ residuals.T, count - 1, of_seeds)

    def combined(self, *weights: float) -> LinearEstimate:
        """Return the sum of the means with these weights."""
        by = np.array(weights)
        value = float(by @ self.means)
        if self.example_freedom == 0:
            return LinearEstimate(value, error=math.inf, freedom=1.0, seed_share=0.0)
        # Rounding may leave a variance of zero a little below it.
        examples = max(float(by @ self.of_examples @ by), 0.0)
        seeds = [
            SeedSpread(weight**2 * found.variance, CAUTION * found.freedom)
            for weight, found in zip(weights, self.of_seeds, strict=True)
            if found is not None
        ]
        variance = examples + sum(part.variance for part in seeds)
        return LinearEstimate(
            value=value,
            error=variance**0.5,
            freedom=_freedom(SeedSpread(examples, self.example_freedom), seeds),
            seed_share=0.0 if variance == 0 else 1 - examples / variance,
        )


def _freedom(examples: SeedSpread, seeds: Sequence[SeedSpread]) -> float:
    """Return Satterthwaite's degrees of freedom of a variance in parts, with cautious parts of seeds.

    Where one arm is much noisier, only its few seeds show the variance. If they are quiet by chance,
    their part is small, and the formula would trust the examples' many degrees of freedom. Their part
    therefore counts as at least LEAST_SEED_SHARE of the examples', in proportion to the imbalance.
    """
    total = sum(part.variance for part in seeds)
    factor = 1.0
    if total > 0:
        # Of two parts this is the difference over the sum. A single part is all imbalance.
        imbalance = max(2 * max(part.variance for part in seeds) / total - 1, 0.0)
        factor = max(1.0, LEAST_SEED_SHARE * imbalance * examples.variance / total)
    parts = [examples, *(SeedSpread(factor * each.variance, each.freedom) for each in seeds)]
    variance = sum(part.variance for part in parts)
    spread = sum(part.variance**2 / part.freedom for part in parts)
    # Without any variance the t distribution has no degrees of freedom.
    return variance**2 / spread if spread > 0 else ENDLESS


def contrast(
    names: tuple[str, str],
    arm: SeedLosses,
    reference: SeedLosses,
    base: SeedLosses,
    split: str = "test",
    margin: EquivalenceMargin | None = None,
    *,
    maximize: bool = False,
    fresh: bool = False,
    metric: str = "eval/loss",
) -> ArmContrast:
    """Compare two arms on the same examples, with a 95 % interval for their difference.

    The standard error is that of paired examples (or of whole groups of them) and of seeds, which are
    independent. The quantile is Student's t at Satterthwaite's degrees of freedom, those of the seeds
    reduced by CAUTION. A single example, or a single group, has no interval. The share retained has
    Fieller's interval. Equivalence is tested by two one-sided tests. A relative margin enters them with
    the uncertainty of the improvement itself.

    Args:
        names: names of the arm and of the reference.
        arm: losses of the arm on the examples of `split`.
        reference: losses of the reference on the same examples, in the same order.
        base: losses of the untuned base on the same examples, with one row.
        split: name of the split, for the record.
        margin: the largest difference that counts as none, fixed before the first trial.
        maximize: True if larger values are better.
        fresh: True if no seed took part in the choice of the configurations.
        metric: name of the metric, for the record.

    Raises:
        ValueError: the three models were not judged on the same examples.
    """
    if not (
        np.array_equal(arm.tokens, reference.tokens) and np.array_equal(arm.tokens, base.tokens)
    ):
        raise ValueError(f"{names[0]}, {names[1]} and the base were judged on different examples")
    joint = JointMeans.of((arm, reference, base))
    difference = joint.combined(1, -1, 0)
    sign = -1 if maximize else 1
    return ArmContrast(
        arm=names[0],
        reference=names[1],
        split=split,
        examples=arm.tokens.size,
        seeds=(arm.losses.size, reference.losses.size),
        losses=(arm.loss, reference.loss),
        base_loss=base.loss,
        difference=difference.interval(),
        retained=_retained(joint, sign),
        noise=(noise_floor(arm.losses), noise_floor(reference.losses)),
        metric=metric,
        standard_error=difference.error if math.isfinite(difference.error) else None,
        freedom=difference.freedom if 0 < difference.error < math.inf else None,
        seed_share=difference.seed_share,
        p_value=difference.two_sided(),
        equivalence_p=None if margin is None else _equivalence(joint, margin, sign),
        fresh=fresh,
        groups=None if arm.groups is None else int(np.unique(arm.groups).size),
        changes=(joint.combined(1, 0, -1).interval(), joint.combined(0, 1, -1).interval()),
    )


def _equivalence(joint: JointMeans, margin: EquivalenceMargin, sign: int) -> float:
    """Return the larger p value of the tests that the arm is not much worse and not much better."""
    # Both of two one-sided tests must reject, so the larger p value counts (Schuirmann 1987).
    if margin.share is None:
        limit = margin.absolute or 0.0
        return max(joint.combined(-1, 1, 0).above(-limit), joint.combined(1, -1, 0).above(-limit))
    # With a gain of base - reference: share * gain - difference and share * gain + difference, above 0.
    share = sign * margin.share
    worse = joint.combined(-1, 1 - share, share).above()
    better = joint.combined(1, -1 - share, share).above()
    return max(worse, better)


def _retained(joint: JointMeans, sign: int) -> IntervalEstimate | None:
    """Return the improvement in % of the reference's with Fieller's interval, or None if it has none."""
    own, reference = joint.combined(-sign, 0, sign), joint.combined(0, -sign, sign)
    if reference.value <= 0:
        return None
    share = own.value / reference.value
    of_share = joint.combined(-sign, sign * share, sign * (1 - share))
    square = t_quantile((1 + LEVEL) / 2, of_share.freedom) ** 2
    both = joint.combined(-sign, -sign, 2 * sign)
    # Var(a + b) = Var(a) + Var(b) + 2 Cov(a, b)
    covariance = (both.error**2 - own.error**2 - reference.error**2) / 2
    # The shares that fit are the roots of a quadratic. It opens upwards only if the reference's
    # improvement differs from zero, and without that there is no bounded set.
    leading = reference.value**2 - square * reference.error**2
    if leading <= 0:
        return None
    middle = own.value * reference.value - square * covariance
    last = own.value**2 - square * own.error**2
    # Rounding may leave a discriminant of zero a little below it.
    root = max(middle**2 - leading * last, 0.0) ** 0.5
    ends = ((middle - root) / leading, (middle + root) / leading)
    return IntervalEstimate(value=100 * share, low=100 * ends[0], high=100 * ends[1])


def example_rows(seeds: Sequence[ExampleLosses], metric: str = "eval/loss") -> SeedLosses:
    """Return the losses of one configuration with one row per seed, or its scores by a metric."""
    groups = np.array(seeds[0].groups, dtype=np.int64) if seeds[0].groups else None
    if metric == "eval/loss":
        nll = np.array([examples.nll for examples in seeds], dtype=np.float64)
        return SeedLosses(nll, np.array(seeds[0].tokens, dtype=np.float64), groups)
    scores = [examples.scores for examples in seeds if examples.scores is not None]
    values = np.array([each.values for each in scores], dtype=np.float64)
    # Scores are of generated answers, whose examples are not the rows that were grouped.
    return SeedLosses(values, np.array(scores[0].weights, dtype=np.float64))
