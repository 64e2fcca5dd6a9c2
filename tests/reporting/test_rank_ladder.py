"""Diminishing returns of LoRA's rank."""

from __future__ import annotations

import numpy as np
import pytest

from sweeper.reporting.next_steps import next_steps
from sweeper.reporting.rank_ladder import (
    MOST_LEADS,
    RankLadder,
    rank_ladder,
    rank_ladders,
    rank_sheet,
)
from sweeper.reporting.report_evidence import ReportEvidence
from sweeper.reporting.results import ArmResult, TrialResult
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


def test_chance_between_single_trials_is_said() -> None:
    """A spread of 0.004 over three seeds: one seed against another brings 0.0243 by chance."""
    ladder = _ladder(0.004)
    assert ladder.chance == pytest.approx(4.303 * 2**0.5 * 0.004, rel=1e-3)
    assert (
        "a difference below 0.0243 (a factor of 1.025 in perplexity) may be chance (95 %)"
        in ladder.words
    )
    assert "How much of a gain is chance is unknown" in _ladder(None).words


def _searched(
    random: np.random.Generator,
    offsets: dict[int, float],
    counts: dict[int, int],
    *,
    drift: float = 0.0,
    cliff: bool = False,
    steepness: float = 0.3,
    deviation: float = 0.01,
) -> ArmResult:
    """An arm that was searched at random.

    Args:
        random: the source of chance.
        offsets: how much worse each rank truly is at its best rate, in nats.
        counts: trials of each rank.
        drift: decades by which the best rate falls with each rank.
        steepness: nats that a rate costs which is a decade away from the best one.
        cliff: True if rates above the best one cost far more than those below.
        deviation: standard deviation between seeds.
    """
    trials: list[TrialResult] = []
    for place, (r, offset) in enumerate(offsets.items()):
        for _ in range(counts[r]):
            rate = 10 ** random.uniform(-4, -2)
            away = np.log10(rate) + 3 + drift * place
            cost = steepness * away**2 * (4 if cliff and away > 0 else 1)
            value = 4.0 + offset + cost + random.normal(0, deviation)
            trials.append(
                make_trial(
                    *("lora", len(trials), "finished", float(value), LORA_COSTS),
                    learning_rate=float(rate),
                    r=r,
                )
            )
    return make_arm("lora", trials)


def _recommended(arm: ArmResult, rank: int) -> bool:
    """Whether a rank is said to be better than another, or larger ones are proposed for it."""
    ladder = rank_ladder(arm, 0.01, freedom=2)
    assert ladder is not None
    steps = " ".join(step.reason for step in next_steps(make_results(arm), ReportEvidence()))
    said = f"r={rank} is better than" in ladder.words
    assert said == any(lead.better == rank for lead in ladder.effects.leads)
    return said or f"r={rank} is the largest rank that was tried" in steps


def _wrong(studies: int, **world: float | bool) -> float:
    """The share of studies that recommend r=32, which is worse than each other rank by one seed sd."""
    random, counts = np.random.default_rng(0), {2: 2, 8: 3, 16: 3, 32: 9}
    offsets = {2: 0.0, 8: 0.0, 16: 0.0, 32: 0.01}
    found = [
        _recommended(_searched(random, offsets, counts, **world), 32)  # type: ignore[arg-type]
        for _ in range(studies)
    ]
    return sum(found) / studies


def test_a_worse_rank_is_rarely_recommended() -> None:
    """The worse rank has most of the trials, so that its best one is often the best of all."""
    assert _wrong(100) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("world", [{}, {"drift": 0.15}, {"cliff": True}, {"steepness": 0.03}])
def test_a_worse_rank_is_rarely_recommended_in_other_worlds(world: dict[str, float | bool]) -> None:
    """Also if the best rate depends on the rank, and if the loss is no parabola of the rate."""
    assert _wrong(1000, **world) <= 0.06


def test_a_much_better_rank_is_found_with_its_interval() -> None:
    """Eight seed deviations over thirty trials are found, and said as a difference with an interval."""
    random = np.random.default_rng(1)
    arm = _searched(random, {2: 0.08, 8: 0.0}, {2: 15, 8: 15})
    ladder = rank_ladder(arm, None)
    assert ladder is not None
    (lead,) = ladder.effects.leads
    assert (lead.better, lead.worse) == (8, 2)
    assert lead.gain.has(0.08)
    assert (
        "Over all 30 trials with learning_rate allowed for: r=8 is better than r=2" in ladder.words
    )
    assert "95 % interval" in ladder.words
    assert "perplexity" in ladder.words


def test_of_many_ranks_only_the_clearest_leads_are_told() -> None:
    """Fourteen ranks have 91 pairs, of which no reader takes in more than a few."""
    random = np.random.default_rng(1)
    offsets = {r: 1.0 / r for r in range(2, 16)}
    arm = _searched(random, offsets, dict.fromkeys(offsets, 4), deviation=0.001)
    ladder = rank_ladder(arm, None)
    assert ladder is not None
    assert len(ladder.effects.leads) > 30
    assert ladder.words.count("is better than") == MOST_LEADS
    assert "r=15 is better than r=2 by" in ladder.words
    assert f"{len(ladder.effects.leads) - MOST_LEADS} other pairs, by less" in ladder.words
    assert ladder.words.startswith("Ranks 2 to 15: 14 were tried. ")


def test_ranks_are_compared_where_two_rates_were_tried() -> None:
    """A curve through two rates cannot be told from a line, which is allowed for all the same."""
    trials = [
        make_trial(
            *("lora", number, "finished", value, LORA_COSTS), learning_rate=1e-3 * (1 + step), r=r
        )
        for number, (r, step) in enumerate([(r, step) for r in (2, 8) for step in (0, 1)] * 3)
        for value in [4.0 + 0.1 * (r == 2) + 0.05 * step + 0.001 * (number % 3)]
    ]
    ladder = rank_ladder(make_arm("lora", trials), 0.001, freedom=2)
    assert ladder is not None
    assert [(lead.better, lead.worse) for lead in ladder.effects.leads] == [(8, 2)]
    assert "Over all 12 trials with learning_rate allowed for" in ladder.words


def test_rates_explain_what_ranks_do_not() -> None:
    """r=2 was tried at bad rates only: all its trials are worse than those of r=8, and no word of it."""
    rates = {2: (8e-3, 8.1e-3, 8.2e-3, 8.3e-3), 8: (1e-3, 1.01e-3, 1.02e-3, 1.03e-3)}
    points = [(r, rate, place) for r, found in rates.items() for place, rate in enumerate(found)]
    trials = [
        make_trial(
            *(
                "lora",
                number,
                "finished",
                (4.4 if r == 2 else 4.0) + 0.001 * (place % 2),
                LORA_COSTS,
            ),
            learning_rate=rate,
            r=r,
        )
        for number, (r, rate, place) in enumerate(points)
    ]
    ladder = rank_ladder(make_arm("lora", trials), 0.001, freedom=4)
    assert ladder is not None
    assert ladder.effects.leads == ()
    assert "no rank is shown to be better than another, or to be enough" in ladder.words


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


def test_few_trials_recommend_nothing() -> None:
    """Four ranks with a trial each, and the rate: there is nothing left to tell chance by."""
    ladder = _ladder(0.0001)
    assert not ladder.effects.sufficient
    assert (
        "5 trials are too few or too alike to compare ranks: no rank is shown to be better"
        in ladder.words
    )


def test_ranks_of_a_maximised_objective_gain_upwards() -> None:
    """ROUGE 0.40, 0.48, 0.49, three times each: gains are in ROUGE, not in nats, and r=2 is worst."""
    trials = [
        make_trial("lora", n, "finished", value + 0.001 * (n // 3), LORA_COSTS, r=r)
        for n, (r, value) in enumerate([(2, 0.40), (4, 0.48), (8, 0.49)] * 3)
    ]
    ladder = rank_ladder(make_arm("lora", trials, objective=ROUGE, facts=ROUGE_FACTS), 0.01, 2)
    assert ladder is not None
    assert [rung.gain for rung in ladder.rungs[1:]] == pytest.approx([0.08, 0.01])
    assert "gain per doubling in eval rougeL: +0.0800 at r=4, +0.0100 at r=8" in ladder.words
    leads = [(lead.better, lead.worse) for lead in ladder.effects.leads]
    assert (8, 2) in leads
    assert (2, 8) not in leads
    assert "nats" not in ladder.words
    assert "perplexity" not in ladder.words
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
    assert sheet.rows[1][-2:] == ("–", "–")
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_one_rank_is_no_ladder() -> None:
    """A study that does not search the rank says nothing about it."""
    assert rank_ladders(two_arms(4.05, 4.0)) == []
    only = make_arm("lora", [make_trial("lora", 0, "finished", 4.0, LORA_COSTS, r=8)])
    assert rank_ladders(make_results(only)) == []
