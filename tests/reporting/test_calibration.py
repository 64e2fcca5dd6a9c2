"""The verdict and the gate are right as often as they say, in simulated studies of known truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.verdict_calibration import CELLS, SEEDS, calibrate, nights, over_looks
from sweeper.core.value import EquivalenceMargin
from sweeper.reporting.intervals import ArmContrast, IntervalEstimate
from sweeper.reporting.results import StudyResults
from sweeper.reporting.verdict import judge
from sweeper.reporting.verdict_doubts import rates_tried
from tests.reporting.studies import (
    FAIRNESS,
    FULL_COSTS,
    LORA_COSTS,
    RATE,
    make_arm,
    make_results,
    make_trial,
)

STUDIES = 2000


def test_equal_arms_in_a_cell_of_the_calibration() -> None:
    """Two hundred studies: coverage near 95 %, hardly a lead, hardly a bias."""
    found = calibrate(CELLS["equal noise"], 200, seed=5)
    assert 0.91 <= found["coverage"] <= 0.99
    assert found["ahead"] <= 0.08
    assert abs(found["bias in seed deviations"]) <= 0.25


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("cell", "coverage", "sharpest"),
    [
        ("equal noise", (0.93, 0.97), 0.88),
        ("one selection seed", (0.93, 0.97), 0.88),
        ("selection of 2 of 12 by 2 seeds", (0.92, 0.971), 0.88),
        ("selection by three seeds", (0.92, 0.98), 0.88),
        ("unequal noise", (0.92, 0.98), 0.88),
        ("groups", (0.92, 0.98), 0.88),
    ],
)
def test_intervals_cover_as_often_as_they_say(
    cell: str, coverage: tuple[float, float], sharpest: float, seed: int
) -> None:
    """Coverage, the shortest quarter of intervals, a lead between equals, the bias of a winner."""
    found = calibrate(CELLS[cell], STUDIES, seed)
    assert coverage[0] <= found["coverage"] <= coverage[1]
    assert found["coverage of the sharpest quarter"] >= sharpest
    assert found["ahead"] <= 0.06
    assert abs(found["bias in seed deviations"]) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_equivalence_is_rarely_wrong(seed: int) -> None:
    """Arms that differ by the margin itself are called equivalent in at most 6 % of studies."""
    assert calibrate(CELLS["gap at the margin"], STUDIES, seed)["equivalent"] <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_six_looks_find_hardly_more_than_one(seed: int) -> None:
    """Equal arms, and a further seed at every look: at most 7 % are told apart."""
    assert over_looks(STUDIES, seed)["by look 6"] <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_keeps_equals_and_finds_the_better(seed: int) -> None:
    """A hundred nights of equal models promote in at most 10 % of sets, three deviations in 80 %."""
    equals = [night is not None for night in nights(100, seed)]
    better = [night is not None for night in nights(500, seed, lead=3.0, length=5)]
    assert np.mean(equals) <= 0.1
    assert np.mean(better) >= 0.8


def _study(random: np.random.Generator) -> StudyResults:
    """A study at random: rates, seeds, looks, margins, and a contrast that may say anything."""
    arms = []
    for name, method, costs in (
        ("lora", "QLoRA", LORA_COSTS),
        ("full", "full fine-tuning", FULL_COSTS),
    ):
        rates = random.choice([1e-4, 3e-4, 1e-3, 3e-3, 1e-2], size=random.integers(2, 12))
        trials = [
            make_trial(
                name,
                number,
                str(random.choice(["finished", "finished", "pruned", "diverged"])),
                float(random.normal(4.0, 0.1)),
                costs,
                learning_rate=float(rate),
            )
            for number, rate in enumerate(rates)
        ]
        searched = (1e-5, 1e-1) if random.random() < 0.9 else None
        exhaustive = bool(random.random() < 0.3)
        arms.append(make_arm(name, trials, method, rates=searched, exhaustive=exhaustive))
    value, error = random.normal(0, 0.03), abs(random.normal(0, 0.01))
    # An earlier version stored contrasts without an interval.
    ends = {} if random.random() < 0.1 else {"low": value - 2 * error, "high": value + 2 * error}
    contrast = ArmContrast(
        arm="lora",
        reference="full",
        split=str(random.choice(["test", "test", "test", "validation"])),
        examples=100,
        seeds=(int(random.integers(1, 5)), int(random.integers(1, 5))),
        losses=(4.0 + value, 4.0),
        base_loss=4.5,
        difference=IntervalEstimate(value=value, **ends),
        retained=None,
        noise=(0.01, 0.01),
        metric=str(random.choice(["eval/loss", "eval/loss", "eval/loss", "eval/rougeL"])),
        standard_error=error,
        freedom=float(random.integers(2, 9)),
        seed_share=0.5,
        p_value=float(random.choice([1e-6, 1e-6, 0.02, 0.2])),
        equivalence_p=float(random.choice([1e-6, 0.5, 0.5])),
        fresh=bool(random.random() < 0.8),
    )
    contrasts = (contrast,) if random.random() < 0.9 else ()
    fairness = FAIRNESS.model_copy(
        update={"min_finished": int(random.integers(1, 5)), "tolerance": 0.99}
    )
    margin = EquivalenceMargin(share=0.05)
    return make_results(
        *arms, fairness=fairness, contrasts=contrasts, equivalence_margin=margin,
        look=int(random.integers(1, 5)),
    )  # fmt: skip


def test_nobody_is_ahead_without_what_a_lead_needs() -> None:
    """Over generated results: a lead has two fresh seeds an arm, enough rates, and a test interval."""
    random = np.random.default_rng(0)
    outcomes = {"ahead": 0, "equivalent": 0, "undecided": 0}
    for results in itertools.islice(iter(lambda: _study(random), None), 1500):
        verdict = judge(results)
        for duel in verdict.duels:
            outcomes[duel.outcome] += 1
            if duel.outcome == "undecided":
                assert "is ahead by" not in verdict.words
                assert "retains" not in verdict.words
                continue
            (found,) = results.contrasts
            assert (found.fresh, found.split, found.metric) == (True, "test", "eval/loss")
            assert min(found.seeds) >= 2
            assert found.difference.low is not None
            for arm in results.arms:
                assert len(rates_tried(arm)) >= results.fairness.min_finished
                assert RATE in arm.ranges
    # A property of nothing would hold.
    assert min(outcomes.values()) >= 10
