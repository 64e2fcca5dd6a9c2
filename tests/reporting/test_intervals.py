"""Intervals: against scipy, against formulas, against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sweeper.core.value import EquivalenceMargin
from sweeper.reporting.intervals import ArmContrast, SeedLosses, contrast, noise_floor

NAMES = ("lora", "full")


def _world(
    seeds: int, seed: int, examples: int = 300, seed_noise: float = 0.0, gap: float = 0.02
) -> tuple[SeedLosses, SeedLosses, SeedLosses]:
    """An arm, a reference that is better by `gap`, and a base that is 0.7 nats worse."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 40, examples).astype(float)
    hard = random.gamma(4, 1, examples)
    differs = gap + random.normal(0, 0.15, examples)

    def judged(offset: np.ndarray | float, count: int) -> SeedLosses:
        noise = random.normal(0, seed_noise, (count, 1)) + random.normal(0, 0.05, (count, examples))
        return SeedLosses((hard + offset + noise) * tokens, tokens)

    return judged(differs, seeds), judged(0.0, seeds), judged(0.7, 1)


def _compare(world: tuple[SeedLosses, SeedLosses, SeedLosses]) -> ArmContrast:
    return contrast(NAMES, *world)


def test_loss_is_weighted_by_tokens() -> None:
    """Two examples of 1 and 3 tokens with 1 and 2 nats a token: 7 nats over 4 tokens."""
    judged = SeedLosses(np.array([[1.0, 6.0]]), np.array([1.0, 3.0]))
    assert judged.loss == pytest.approx(7 / 4)


def test_one_seed_agrees_with_scipy_on_paired_examples() -> None:
    """SciPy's paired percentile bootstrap of the same ratio of sums gives the same interval."""
    arm, full, base = _world(1, seed=1)
    ours = _compare((arm, full, base)).difference

    def statistic(a: np.ndarray, b: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a - b).sum(axis=axis) / tokens.sum(axis=axis)

    theirs = stats.bootstrap(
        (arm.nll[0], full.nll[0], arm.tokens),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.low is not None
    assert ours.high is not None
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_equal_token_counts_agree_with_the_t_test() -> None:
    """With one seed and equal lengths the ratio is a mean: the paired t interval, by formula."""
    random = np.random.default_rng(2)
    tokens = np.full(400, 10.0)
    full = random.gamma(4, 1, (1, 400)) * tokens
    arm = full + random.normal(0.03, 0.2, (1, 400)) * tokens
    found = _compare(
        (SeedLosses(arm, tokens), SeedLosses(full, tokens), SeedLosses(full + 7.0, tokens))
    ).difference
    low, high = stats.ttest_rel(arm[0] / 10, full[0] / 10).confidence_interval()
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_seed_noise_alone_agrees_with_welchs_t_test() -> None:
    """With identical examples only seeds vary, and the interval is as wide as Welch's t test."""
    random = np.random.default_rng(3)
    tokens = np.ones(20)
    rows = [np.tile(random.normal(mean, 0.01, (8, 1)), (1, 20)) for mean in (4.02, 4.0)]
    found = _compare(
        (
            SeedLosses(rows[0], tokens),
            SeedLosses(rows[1], tokens),
            SeedLosses(rows[1][:1] + 1, tokens),
        )
    )
    low, high = stats.ttest_ind(rows[0][:, 0], rows[1][:, 0], equal_var=False).confidence_interval()
    assert found.difference.low is not None
    assert found.difference.high is not None
    assert found.difference.high - found.difference.low == pytest.approx(high - low, rel=0.1)
    assert found.noise == pytest.approx([rows[0][:, 0].std(ddof=1), rows[1][:, 0].std(ddof=1)])


def test_order_of_examples_and_of_seeds_changes_no_estimate() -> None:
    """Shuffled examples and seeds: the same estimates, and intervals equal up to resampling."""
    arm, full, base = _world(3, seed=4, seed_noise=0.01)
    order, seeds = np.random.default_rng(0).permutation(300), [2, 0, 1]
    other = [SeedLosses(one.nll[:, order], one.tokens[order]) for one in (arm, full, base)]
    other[0] = SeedLosses(other[0].nll[seeds], other[0].tokens)
    first, second = _compare((arm, full, base)), _compare((other[0], other[1], other[2]))
    assert first.difference.value == pytest.approx(second.difference.value)
    assert first.difference.low == pytest.approx(second.difference.low, abs=0.004)
    assert first.retained is not None
    assert second.retained is not None
    assert first.retained.value == pytest.approx(second.retained.value)


def test_a_constant_added_to_all_changes_no_difference() -> None:
    """What is hard for both says nothing about either: pairing takes it out."""
    arm, full, base = _world(2, seed=5)
    hard = np.random.default_rng(1).gamma(9, 3, 300)
    harder = [SeedLosses(one.nll + hard * one.tokens, one.tokens) for one in (arm, full, base)]
    before, after = _compare((arm, full, base)), _compare((harder[0], harder[1], harder[2]))
    assert after.difference.value == pytest.approx(before.difference.value)
    assert after.difference.low == pytest.approx(before.difference.low, rel=0.15)


def test_swapping_the_arms_turns_the_sign() -> None:
    """lora - full is -(full - lora), to the ends of the interval up to resampling."""
    arm, full, base = _world(3, seed=6)
    there, back = _compare((arm, full, base)).difference, _compare((full, arm, base)).difference
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-(back.high or 0), abs=0.004)


def test_retained_is_the_share_of_the_improvement() -> None:
    """0.68 of 0.70 nats is 97.1 %, and the interval has it inside."""
    found = _compare(_world(3, seed=8, examples=3000)).retained
    assert found is not None
    assert found.value == pytest.approx(100 * 0.68 / 0.70, abs=1.0)
    assert found.has(100 * 0.68 / 0.70)


def test_no_share_of_no_improvement() -> None:
    """Full fine-tuning that is worse than the base gives nothing to take a share of."""
    arm, full, base = _world(2, seed=9)
    assert _compare((arm, base, full)).retained is None


def test_no_share_of_a_doubtful_improvement() -> None:
    """Where the reference may not have improved at all, a ratio has no bounded set of values."""
    tokens = np.ones(50)
    random = np.random.default_rng(10)
    base = random.gamma(4, 1, (1, 50))
    full = base + random.normal(0, 1, (1, 50)) - 0.05
    full += base.mean() - 0.01 - full.mean()
    arm = full - 0.01 + random.normal(0, 0.1, (1, 50))
    models = (SeedLosses(rows, tokens) for rows in (arm, full, base))
    assert _compare(tuple(models)).retained is None  # type: ignore[arg-type]


def test_different_examples_are_refused() -> None:
    """Pairing needs the same examples in the same order."""
    arm, full, base = _world(1, seed=11)
    moved = SeedLosses(full.nll[:, ::-1], full.tokens[::-1])
    with pytest.raises(ValueError, match="judged on different examples"):
        _compare((arm, moved, base))
    with pytest.raises(ValueError, match="nll is \\[seeds, examples\\]"):
        SeedLosses(arm.nll[0], arm.tokens)
    with pytest.raises(ValueError, match="needs a target token"):
        SeedLosses(arm.nll, arm.tokens * 0)


def test_noise_floor_needs_two_seeds() -> None:
    """Standard deviation with n - 1; one seed says nothing."""
    assert noise_floor(np.array([4.0, 4.2])) == pytest.approx(0.2 / 2**0.5)
    assert noise_floor(np.array([4.0])) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_models_are_no_evidence_of_a_difference(seeds: int) -> None:
    """Models with the same losses on every example: no difference, p = 1, and surely within a margin."""
    _, full, base = _world(1, seed=12)
    same = SeedLosses(np.tile(full.nll, (seeds, 1)), full.tokens)
    found = contrast(NAMES, same, same, base, margin=EquivalenceMargin(absolute=0.01))
    assert (found.difference.value, found.standard_error) == (0, 0)
    assert found.p_value == 1
    assert found.equivalence_p == 0


def test_a_constant_difference_is_certain() -> None:
    """Every example worse by the same amount per token, without any noise: p = 0."""
    tokens = np.ones(20)
    rows = np.full((1, 20), 2.0)
    found = _compare(
        (SeedLosses(rows + 0.5, tokens), SeedLosses(rows, tokens), SeedLosses(rows + 1, tokens))
    )
    assert (found.difference.value, found.standard_error, found.p_value) == (0.5, 0, 0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_example_or_one_group_has_no_interval(grouped: bool, seeds: int) -> None:
    """A single draw shows no spread over examples, so nothing is certain, with any number of seeds."""
    examples = 5 if grouped else 1
    random = np.random.default_rng(13)
    groups = np.zeros(examples, dtype=np.int64) if grouped else None

    def judged(count: int) -> SeedLosses:
        return SeedLosses(random.gamma(4, 1, (count, examples)), np.ones(examples), groups)

    margin = EquivalenceMargin(absolute=100.0)
    found = contrast(NAMES, judged(seeds), judged(seeds), judged(1), margin=margin)
    assert found.difference.low is None
    assert found.standard_error is None
    assert found.p_value == 1
    assert found.equivalence_p == 0.5
    assert found.retained is None
    assert found.changes is not None
    assert found.changes[0].low is None
    assert found.model_validate_json(found.model_dump_json()) == found
