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
    ladder = rank_ladder(make_arm("lora", [*trials, worse, pruned]), noise, freedom=2)
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


def test_only_differences_beyond_chance_are_said() -> None:
    """A spread of 0.004 over three seeds: one seed against another brings 0.0243 by chance."""
    ladder = _ladder(0.004)
    assert ladder.chance == pytest.approx(4.303 * 2**0.5 * 0.004, rel=1e-3)
    assert "a difference below 0.0243 may be chance (95 %)" in ladder.words
    assert "r=32 is better than r=2, r=4 by more" in ladder.words
    assert "r=8" not in ladder.words.partition("r=32 is better")[2]
    assert "no rank is shown to be better than another, or to be enough" in _ladder(0.05).words


def test_a_rank_that_was_tried_with_other_modules_is_not_compared() -> None:
    """r=16 on attention only says nothing about r=16 on all modules."""
    modules = {2: "all-linear", 8: "all-linear", 16: "attention"}
    trials = [
        make_trial("lora", n, "finished", value, LORA_COSTS, r=r)
        for n, (r, value) in enumerate({2: 4.2, 8: 4.0, 16: 4.3}.items())
    ]
    named = [
        trial.model_copy(
            update={"params": {**trial.params, "adapter.target_modules": modules[int(r)]}}
        )
        for trial in trials
        if isinstance(r := trial.params["adapter.r"], int)
    ]
    ladder = rank_ladder(make_arm("lora", named), 0.001, freedom=2)
    assert ladder is not None
    assert [rung.r for rung in ladder.rungs] == [2, 8]
    assert "Ranks 2 → 8 with target_modules=all-linear" in ladder.words
    assert "Not compared, because it was tried with other choices only: r=16." in ladder.words
    assert "beyond" not in ladder.words


def test_unknown_noise_recommends_nothing() -> None:
    """With one seed nobody knows which differences are chance."""
    ladder = _ladder(None)
    assert ladder.worse == ()
    assert "How much of that is chance is unknown" in ladder.words


def test_ranks_of_a_maximised_objective_gain_upwards() -> None:
    """ROUGE 0.40, 0.48, 0.49: gains are in ROUGE, not in nats, and r=2 is worse beyond chance."""
    trials = [
        make_trial("lora", n, "finished", value, LORA_COSTS, r=r)
        for n, (r, value) in enumerate({2: 0.40, 4: 0.48, 8: 0.49}.items())
    ]
    ladder = rank_ladder(make_arm("lora", trials, objective=ROUGE, facts=ROUGE_FACTS), 0.01, 2)
    assert ladder is not None
    assert [rung.gain for rung in ladder.rungs[1:]] == pytest.approx([0.08, 0.01])
    assert ladder.best.r == 8
    assert "gain per doubling in eval rougeL: +0.0800 at r=4, +0.0100 at r=8" in ladder.words
    assert "r=8 is better than r=2 by more" in ladder.words
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
