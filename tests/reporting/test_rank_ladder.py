"""Diminishing returns of LoRA's rank."""

from __future__ import annotations

import pytest

from sweeper.reporting.rank_ladder import RankLadder, rank_ladder, rank_ladders, rank_sheet
from tests.reporting.studies import (
    LORA_COSTS,
    ROUGE,
    ROUGE_FACTS,
    make_arm,
    make_results,
    make_trial,
    two_arms,
)

LOSSES = {2: 4.20, 4: 4.12, 8: 4.08, 32: 4.079}


def _ladder(noise: float | None, losses: dict[int, float] = LOSSES) -> RankLadder:
    """Ranks with 100 parameters a rank, and time growing by a second a rank."""
    trials = [
        make_trial(
            "lora",
            number,
            "finished",
            loss,
            {**LORA_COSTS, "parameters/trainable": 100.0 * r, "cost/seconds": 10.0 + r},
            r=r,
        )
        for number, (r, loss) in enumerate(losses.items())
    ]
    worse = make_trial("lora", 98, "finished", 4.9, LORA_COSTS, r=8)
    pruned = make_trial("lora", 99, "pruned", 3.0, LORA_COSTS, r=2)
    ladder = rank_ladder(make_arm("lora", [*trials, worse, pruned]), noise)
    assert ladder is not None
    return ladder


def test_each_rank_counts_with_its_best_finished_trial() -> None:
    """The best over all else; pruned trials did not see the end of the schedule."""
    ladder = _ladder(None)
    assert {rung.r: rung.value for rung in ladder.rungs} == LOSSES
    assert [rung.trials for rung in ladder.rungs] == [1, 1, 2, 1]


def test_gains_are_per_doubling_parameter_and_second() -> None:
    """From 8 to 32 are two doublings, 2,400 parameters and 24 seconds for 0.001 nats."""
    last = _ladder(None).rungs[-1]
    assert last.gain == pytest.approx(0.001)
    assert last.per_doubling == pytest.approx(0.0005)
    assert last.per_million_parameters == pytest.approx(0.001 / 2400 * 1e6)
    assert last.per_second == pytest.approx(0.001 / 24)


def test_smallest_rank_within_the_noise_of_the_best() -> None:
    """r=8 is 0.001 behind r=32: enough under a noise of 0.004, not under one of 0.0005."""
    assert (
        "r=8 is the smallest rank within the noise (0.0040) of the best, r=32"
        in _ladder(0.004).words
    )
    assert "No smaller rank comes within the noise (0.0005) of r=32" in _ladder(0.0005).words


def test_unknown_noise_recommends_nothing() -> None:
    """With one seed nobody knows which differences are chance."""
    ladder = _ladder(None)
    assert ladder.enough is None
    assert "How much of that is chance is unknown" in ladder.words


def test_diminishing_returns_are_said_only_where_they_are() -> None:
    """2 → 4 → 8 with falling gains per doubling, against gains that rise."""
    assert "Ranks 2 → 4 → 8 → 32" in _ladder(None).words
    assert "with diminishing returns" in _ladder(None).words
    rising = _ladder(None, {2: 4.2, 4: 4.15, 8: 4.0})
    assert "with diminishing returns" not in rising.words
    worse = _ladder(None, {2: 4.2, 4: 4.1, 8: 4.15})
    assert "+0.1000 at r=4, -0.0500 at r=8, none beyond r=4." in worse.words


def test_ranks_of_a_maximised_objective_gain_upwards() -> None:
    """ROUGE 0.40, 0.48, 0.49: a noise of 0.02 lets r=4 do, and gains are in ROUGE, not in nats."""
    trials = [
        make_trial("lora", n, "finished", value, LORA_COSTS, r=r)
        for n, (r, value) in enumerate({2: 0.40, 4: 0.48, 8: 0.49}.items())
    ]
    ladder = rank_ladder(make_arm("lora", trials, objective=ROUGE, facts=ROUGE_FACTS), 0.02)
    assert ladder is not None
    assert [rung.gain for rung in ladder.rungs[1:]] == pytest.approx([0.08, 0.01])
    assert ladder.best.r == 8
    assert "gain per doubling in eval rougeL: +0.0800 at r=4, +0.0100 at r=8" in ladder.words
    assert "r=4 is the smallest rank within the noise" in ladder.words
    assert "eval rougeL" in rank_sheet(ladder).columns


def test_nothing_is_divided_by_nothing() -> None:
    """A larger rank on fewer modules may add no parameters: the gain per parameter is a dash."""
    trials = [
        make_trial("lora", n, "finished", 4.2 - n / 10, LORA_COSTS, r=r)
        for n, r in enumerate((2, 4))
    ]
    ladder = rank_ladder(make_arm("lora", trials), 0.01)
    assert ladder is not None
    assert ladder.rungs[1].per_million_parameters is None
    sheet = rank_sheet(ladder)
    assert sheet.rows[1][-3:] == ("+10.0×", "–", "–")
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_one_rank_is_no_ladder() -> None:
    """A study that does not search the rank says nothing about it."""
    assert rank_ladders(two_arms(4.05, 4.0)) == []
    only = make_arm("lora", [make_trial("lora", 0, "finished", 4.0, LORA_COSTS, r=8)])
    assert rank_ladders(make_results(only)) == []
