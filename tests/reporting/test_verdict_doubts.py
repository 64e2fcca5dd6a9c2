"""Whose search was too small for a verdict: rates, edges, and what a grid of one value proves."""

from __future__ import annotations

import shlex

import pytest

from sweeper.config.settings import FairnessRules
from sweeper.config.space import Choice
from sweeper.reporting.results import ArmResult, SearchedRange, StudyResults
from sweeper.reporting.verdict import judge
from sweeper.reporting.verdict_doubts import searched_otherwise
from sweeper.search.study_plan import studies
from tests.reporting.studies import FULL_COSTS, LORA_COSTS, RATE, make_arm, make_results, make_trial

RULE = FairnessRules(equal="trials", tolerance=0.1, min_finished=4)
COMMAND = "+experiment=lr_rank_sweep -m"
LADDER = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def _lora(rates: tuple[float, ...] = LADDER, best: float = 3e-3, **fields: object) -> ArmResult:
    trials = [
        make_trial("lora", n, "finished", 4.0 + (rate != best), LORA_COSTS, learning_rate=rate)
        for n, rate in enumerate(rates)
    ]
    options: dict[str, object] = {"rates": (3e-4, 3e-2), **fields}
    return make_arm("lora", trials, **options)  # type: ignore[arg-type]


def _full(tried: tuple[float, ...], causes: tuple[str, ...] = (), best: float = 3e-4) -> ArmResult:
    """A full arm whose grid is walked to its end. One rate alone is no range."""
    trials = [
        make_trial(
            "full",
            n,
            causes[n] if causes else "finished",
            4.0 + (rate != best),
            FULL_COSTS,
            learning_rate=rate,
        )
        for n, rate in enumerate(tried)
    ]
    rates = tried if len(tried) > 1 else None
    options: dict[str, object] = {"exhaustive": True, "continuous": False}
    return make_arm("full", trials, "full fine-tuning", "float32", rates, **options)  # type: ignore[arg-type]


def _results(*arms: ArmResult) -> StudyResults:
    return make_results(*arms, fairness=RULE).model_copy(update={"command": COMMAND})


@pytest.mark.parametrize("tried", [(5e-3,), (1e-4, 3e-4, 1e-3)])
def test_a_strawman_of_few_rates_makes_the_verdict_provisional(tried: tuple[float, ...]) -> None:
    """An exhausted grid of one bad rate, or of three, is no search, and the command gives it one."""
    verdict = judge(_results(_lora(), _full(tried, best=tried[len(tried) // 2])))
    assert verdict.words.startswith("PROVISIONAL")
    doubts = [doubt for doubt in verdict.doubts if doubt.arm == "full"]
    assert doubts
    for doubt in doubts:
        (plan,) = studies(shlex.split(doubt.command)[:-1])
        full = next(arm for arm in plan.arms if arm.name == "full")
        rates = full.space[RATE]
        assert isinstance(rates, Choice)
        assert len(rates.values) >= full.n_trials >= RULE.min_finished
        assert set(tried) < set(rates.values)
        assert plan.study.study_name != "lr_rank_sweep"


def test_an_arm_whose_rate_was_not_searched_is_in_doubt() -> None:
    """Twelve trials over other settings at one rate show no best rate."""
    trials = [
        make_trial("lora", n, "finished", 4.0 + n / 10, LORA_COSTS, learning_rate=1e-3, r=2**n)
        for n in range(5)
    ]
    verdict = judge(_results(make_arm("lora", trials), _full((1e-4, 2e-4, 3e-4, 1e-3, 3e-3))))
    (doubt,) = verdict.doubts
    assert doubt.arm == "lora"
    assert "the learning rate of QLoRA was not searched (0.001 in every trial)" in doubt.reason
    lora = studies(shlex.split(doubt.command)[:-1])[0].arms[0]
    assert RATE in lora.space


def test_an_arm_alone_needs_no_searched_rate() -> None:
    """Without another arm no comparison can be unfair, and a search of ranks is an answer."""
    trials = [
        make_trial("lora", n, "finished", 4.0 + n / 10, LORA_COSTS, learning_rate=1e-3, r=2**n)
        for n in range(5)
    ]
    assert not judge(_results(make_arm("lora", trials))).provisional


def test_a_pruned_rate_was_tried() -> None:
    """Of five grid points two were pruned: the five rates show which one is best."""
    causes = ("pruned", "finished", "finished", "finished", "pruned")
    assert not judge(_results(_lora(), _full((1e-4, 2e-4, 3e-4, 1e-3, 3e-3), causes))).provisional


def test_rates_are_counted_and_not_trials() -> None:
    """Five finished trials at two rates searched two rates."""
    verdict = judge(_results(_lora((3e-3, 3e-3, 3e-3, 1e-3, 1e-3)), _full(LADDER, best=3e-3)))
    (doubt,) = verdict.doubts
    assert "QLoRA was tried with 2 learning rates, fewer than fairness.min_finished=4" in (
        doubt.reason
    )


@pytest.mark.parametrize(("searching", "for_all"), [(("lora", "full"), True), (("full",), False)])
def test_a_key_that_all_arms_search_is_changed_in_all(
    searching: tuple[str, ...], for_all: bool
) -> None:
    """Epochs that differ between arms would be no fair comparison. A key of one arm stays that arm's."""
    searched = {"training.num_train_epochs": SearchedRange(values=(1, 3), continuous=True)}
    arms = [
        make_arm(name, [make_trial(name, 0, "finished", 4.0)]).model_copy(
            update={"ranges": searched if name in searching else {}}
        )
        for name in ("lora", "full")
    ]
    results = make_results(*arms)
    command = searched_otherwise(results, arms[1], "shorter", "training.num_train_epochs", "0.5")
    assert ("training.num_train_epochs=0.5" in command) == for_all
    assert ("hydra.sweeper.arms.full.params" in command) != for_all


def _with_ranges(values: tuple[float, ...], tried: tuple[float, ...], key: str) -> ArmResult:
    trials = [
        make_trial("lora", n, "finished", 4.0 + n / 10, LORA_COSTS, learning_rate=rate)
        for n, rate in enumerate((3e-3, 1e-3, 5e-3, 2e-3, 4e-3))
    ]
    named = [
        trial.model_copy(update={"params": {**trial.params, key: value}})
        for trial, value in zip(trials, tried, strict=True)
    ]
    arm = make_arm("lora", named, rates=(3e-4, 3e-2))
    ranges = {**arm.ranges, key: SearchedRange(values=values, continuous=len(values) == 2)}
    return arm.model_copy(update={"ranges": ranges})


@pytest.mark.parametrize(
    ("key", "values", "tried", "words"),
    [
        ("adapter.alpha_over_r", (1, 2, 4), (1, 1, 1, 1, 1), "The best trial of QLoRA has "
         "alpha_over_r=1, the lowest offered (1 to 4), as all of its best 5 trials"),
        ("adapter.r", (2, 8, 32), (32, 8, 32, 2, 2), "QLoRA has r=32, the highest offered"),
        ("training.warmup_ratio", (0.0, 0.1), (0.099, 0.0, 0.0, 0.0, 0.0), "QLoRA has "
         "warmup_ratio=0.099, near the highest offered"),
    ],
)  # fmt: skip
def test_edges_of_other_settings_are_named(
    key: str, values: tuple[float, ...], tried: tuple[float, ...], words: str
) -> None:
    """Rank, alpha and warm-up at an end of their range are said, and leave the verdict standing."""
    verdict = judge(_results(_with_ranges(values, tried, key), _full(LADDER, best=3e-3)))
    assert not verdict.provisional
    assert words in verdict.words


@pytest.mark.parametrize("best", [0.0, 0.05])
def test_no_edge_where_nothing_lies_beyond(best: float) -> None:
    """No warm-up is the least there can be, and a value in the middle has both sides."""
    arm = _with_ranges((0.0, 0.1), (best, 0.1, 0.1, 0.1, 0.1), "training.warmup_ratio")
    assert "offered" not in judge(_results(arm)).words
