"""The verdict: what the numbers carry, and no more."""

from __future__ import annotations

import json
import shlex

import pytest

from sweeper.config.settings import FairnessRules
from sweeper.config.space import Choice, Interval
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.results import ArmResult, SearchedRange, StudyResults
from sweeper.reporting.verdict import Verdict, judge
from sweeper.reporting.verdict_doubts import wider, with_override
from sweeper.search.study_plan import studies
from tests.reporting.studies import (
    FACTS,
    FAIRNESS,
    FULL_COSTS,
    LORA_COSTS,
    RATE,
    ROUGE,
    ROUGE_FACTS,
    make_arm,
    make_results,
    make_trial,
    two_arms,
)
from tests.reporting.test_result_tables import CONTRAST

LR_RANK_SWEEP = "+experiment=lr_rank_sweep -m"


def _judged(low: float, high: float, seeds: tuple[int, int] = (3, 3)) -> Verdict:
    """Two arms with a test-split difference of the given interval."""
    middle = (low + high) / 2
    found = CONTRAST.model_copy(
        update={
            "difference": IntervalEstimate(value=middle, low=low, high=high),
            "seeds": seeds,
            "p_value": 0.5 if low <= 0 <= high else 0.001,
        }
    )
    return judge(make_results(*two_arms(4.05, 4.0).arms, contrasts=(found,), look=1))


def _full(rates: tuple[float, ...], best: float, **fields: object) -> ArmResult:
    """A full arm that tried every one of some rates."""
    trials = [
        make_trial("full", n, "finished", 4.0 + (rate != best), FULL_COSTS, learning_rate=rate)
        for n, rate in enumerate(rates)
    ]
    options = {"exhaustive": True, "continuous": False, **fields}
    return make_arm("full", trials, "full fine-tuning", "float32", rates, **options)


def _lora(count: int, best: float = 3e-3) -> ArmResult:
    trials = [
        make_trial("lora", n, "finished", 4.0 + n, LORA_COSTS, learning_rate=best)
        for n in range(count)
    ]
    return make_arm("lora", trials, rates=(3e-4, 3e-2))


def test_words_give_share_parameters_time_memory_and_space() -> None:
    """0.45 of 0.5 nats is 90 %, with 5 % of the parameters in half the time."""
    verdict = _judged(0.03, 0.07)
    assert "retains 90.0 % (95 % interval 86.0 to 94.0) of full" in verdict.words
    assert "QLoRA trains 5 % of the parameters and takes 0.5× the peak memory" in verdict.words
    assert "0.5× the peak memory and 0.05× the disk space" in verdict.words
    (duel,) = verdict.duels
    assert duel.difference.value == pytest.approx(0.05)
    assert duel.side.device_seconds == 10.0
    assert not verdict.provisional


def test_one_seed_and_no_test_split_has_no_interval_and_says_so() -> None:
    """Validation losses of one seed each decide nothing, and no share is told."""
    verdict = judge(two_arms(4.05, 4.0))
    assert verdict.duels[0].ahead is None
    assert "Undecided: the validation loss of QLoRA minus full" in verdict.words
    assert "no confidence interval rules out chance" in verdict.words
    assert "Seeds: 1 against 1, on the split that selected them" in verdict.words
    assert "retains" not in verdict.words


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.01, 0.02, "+0.0200; a factor of 1.005 in perplexity), which may be zero"),
        (0.03, 0.07, "Full fine-tuning is ahead by 0.0500 nats (95 % interval 0.0300 to 0.0700; "),
        (-0.07, -0.03, "QLoRA is ahead by 0.0500 nats (95 % interval 0.0300 to 0.0700; "),
    ],
)
def test_an_interval_that_holds_zero_is_undecided(low: float, high: float, words: str) -> None:
    """Not called a tie, and no share is told. Otherwise the arm with the lower loss is ahead."""
    verdict = _judged(low, high)
    assert words in verdict.words
    assert (verdict.duels[0].ahead is None) == ("zero" in words)
    assert ("Undecided" in verdict.words) == ("retains" not in verdict.words) == ("zero" in words)
    assert "tie" not in verdict.words.split()


def test_the_test_split_is_what_the_verdict_rests_on() -> None:
    """Losses, share and noise floor are those of the finalists on the test split."""
    words = _judged(0.03, 0.07).words
    assert "90.0 % (95 % interval 86.0 to 94.0) of full fine-tuning's improvement" in words
    assert "(test loss 4.0600 against 4.0100)" in words
    assert (
        "Noise floor (standard deviation over seeds): 0.0040 (QLoRA), 0.0060 (full fine-tuning) nats"
        in words
    )


def test_an_interval_without_seeds_says_what_it_covers() -> None:
    """With one seed the interval is over examples only."""
    assert "not other seeds" in _judged(0.03, 0.07, seeds=(1, 3)).words


@pytest.mark.parametrize(
    ("lora", "full", "words"),
    [
        (4.6, 4.0, "no better than the untuned base"),
        (4.0, None, "eval loss by 0.500 nats (a factor of 0.607 in perplexity). There is no other"),
        (4.6, None, "is no better than the untuned base"),
        (4.0, 4.6, "Full fine-tuning is no better than the untuned base"),
        (None, None, "No trial has finished, so"),
        (None, 4.0, "QLoRA has no finished trial (1 oom)"),
    ],
)
def test_words_claim_no_more_than_the_numbers(
    lora: float | None, full: float | None, words: str
) -> None:
    """No share is computed where there is nothing to take a share of."""
    assert words in judge(two_arms(lora, full)).words


def test_a_maximised_objective_is_worded_the_other_way() -> None:
    """ROUGE 0.4 against 0.5 over a base of 0.1: three quarters kept, and the higher arm is ahead."""
    verdict = judge(two_arms(0.4, 0.5, objective=ROUGE, facts=ROUGE_FACTS))
    (duel,) = verdict.duels
    assert duel.difference.value == pytest.approx(-0.1)
    assert duel.retained is not None
    assert duel.retained.value == pytest.approx(75.0)
    assert duel.better.label == "full fine-tuning"
    assert "validation rougeL 0.4000 against 0.5000" in verdict.words
    assert (
        "the validation rougeL of QLoRA minus full fine-tuning's is -0.1000, and no"
        in verdict.words
    )
    assert "nats" not in verdict.words
    assert verdict.document()["objective"]["metric"] == "eval/rougeL"


@pytest.mark.parametrize(
    ("rouge", "words"),
    [
        (0.35, "raises the untuned base's eval rougeL by 0.250."),
        (0.05, "is no better than the untuned base"),
    ],
)
def test_an_arm_alone_is_held_against_the_base_by_the_objective(rouge: float, words: str) -> None:
    """Above the base is better where the objective is maximised."""
    assert words in judge(two_arms(rouge, None, objective=ROUGE, facts=ROUGE_FACTS)).words


def test_test_losses_decide_no_study_by_another_metric() -> None:
    """Contrasts are of losses; by ROUGE the arms are compared where ROUGE was measured."""
    arms = two_arms(0.4, 0.5, objective=ROUGE, facts=ROUGE_FACTS).arms
    (duel,) = judge(make_results(*arms, contrasts=(CONTRAST,))).duels
    assert (duel.split, duel.values) == ("validation", (0.4, 0.5))


def test_the_share_has_one_zero_line() -> None:
    """A base that NF4 made worse does not flatter QLoRA: both gains count from the full arm's base."""
    results = two_arms(4.05, 4.0)
    worse = FACTS.model_copy(update={"base_metrics": {"eval/loss": 4.9, "eval/perplexity": 134.0}})
    lora = results.arms[0].model_copy(update={"facts": worse})
    (duel,) = judge(results.model_copy(update={"arms": (lora, results.arms[1])})).duels
    assert duel.retained is not None
    assert duel.retained.value == pytest.approx(90.0)


def test_any_number_of_arms_is_held_against_full_fine_tuning() -> None:
    """QLoRA and bf16 LoRA each get their sentence; the reference gets none."""
    results = two_arms(4.05, 4.0)
    trials = [make_trial("bf16", 0, "finished", 4.1, LORA_COSTS)]
    verdict = judge(make_results(*results.arms, make_arm("bf16", trials, "LoRA", "bfloat16")))
    assert [(duel.side.label, duel.reference.label) for duel in verdict.duels] == [
        ("QLoRA", "full fine-tuning"),
        ("LoRA (bf16)", "full fine-tuning"),
    ]
    found = verdict.duels[1].retained
    assert found is not None
    assert found.value == pytest.approx(80.0)


def test_an_arm_that_was_not_judged_on_the_test_split_is_compared_on_the_other() -> None:
    """Losses of two splits are never held against each other."""
    trials = [make_trial("bf16", 0, "finished", 4.1, LORA_COSTS)]
    arms = (*two_arms(4.05, 4.0).arms, make_arm("bf16", trials, "LoRA", "bfloat16"))
    judged, not_judged = judge(make_results(*arms, contrasts=(CONTRAST,))).duels
    assert (judged.split, judged.values) == ("test", (4.06, 4.01))
    assert (not_judged.split, not_judged.values) == ("validation", (4.1, 4.0))
    assert not_judged.ahead is None


def test_without_full_fine_tuning_the_second_arm_is_the_reference() -> None:
    """NF4 against an unquantized base is a question of its own."""
    arms = [
        make_arm("lora", [make_trial("lora", 0, "finished", 4.1, LORA_COSTS)]),
        make_arm("plain", [make_trial("plain", 0, "finished", 4.0, LORA_COSTS)], "LoRA", "float32"),
    ]
    (duel,) = judge(make_results(*arms)).duels
    assert duel.reference.label == "LoRA (plain)"


def test_all_failed_is_no_comparison() -> None:
    """Arms without a finished trial are named with their causes, and nothing is provisional."""
    arms = [
        make_arm("lora", [make_trial("lora", n, "diverged", None) for n in range(3)]),
        make_arm("full", [make_trial("full", 0, "oom", None)], "full fine-tuning"),
    ]
    verdict = judge(make_results(*arms))
    assert "QLoRA has no finished trial (3 diverged)" in verdict.words
    assert "Full fine-tuning has no finished trial (1 oom)" in verdict.words
    assert verdict.duels == verdict.doubts == ()


def test_a_best_rate_at_the_edge_makes_the_verdict_provisional() -> None:
    """The first word is PROVISIONAL, the reason names the range, the command widens that arm's."""
    rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    results = make_results(_lora(5), _full(rates, best=3e-3))
    verdict = judge(results.model_copy(update={"command": LR_RANK_SWEEP}))
    assert verdict.words.startswith(
        "PROVISIONAL: another run could change this answer. The best learning rate of full "
        "fine-tuning (0.003)"
    )
    assert "outer tenth of its search range (3e-05 to 0.003)" in verdict.words
    (doubt,) = verdict.doubts
    assert verdict.text.endswith("    python -m sweeper " + doubt.command)
    (plan,) = studies(shlex.split(doubt.command)[:-1])
    assert plan.study.study_name == "mine_wider"
    full = next(arm for arm in plan.arms if arm.name == "full")
    assert full.space[RATE] == Choice((*rates, 0.00949, 0.03))
    assert full.n_trials == 7


def test_the_lora_arms_range_is_widened_by_its_own_key() -> None:
    """Its command-line override replaces the range of the lora arm and of no other."""
    verdict = judge(
        make_results(_lora(5, best=3.2e-4)).model_copy(update={"command": LR_RANK_SWEEP})
    )
    (doubt,) = verdict.doubts
    lora, full = studies(shlex.split(doubt.command)[:-1])[0].arms
    assert lora.space[RATE] == Interval(3e-5, 3e-2, log=True)
    assert full.space[RATE] == Choice((3e-5, 1e-4, 3e-4, 1e-3, 3e-3))


@pytest.mark.parametrize(
    ("rate", "edge"), [(3.5e-4, True), (5e-4, False), (1.8e-2, False), (2e-2, True)]
)
def test_the_outer_tenth_is_of_the_logarithm(rate: float, edge: bool) -> None:
    """Of two decades, a fifth of a decade at either end: 4.75e-4 and 1.89e-2."""
    assert judge(make_results(_lora(5, best=rate))).provisional is edge


def test_ranges_widen_by_a_decade() -> None:
    """Intervals move one end, choices get two more values half a decade apart."""
    interval, choice = (
        SearchedRange(values=(1e-4, 1e-2), continuous=True),
        SearchedRange(values=(1e-4,), continuous=False),
    )
    assert wider(interval, downwards=True) == "tag(log, interval(1e-05, 0.01))"
    assert wider(interval, downwards=False) == "tag(log, interval(0.0001, 0.1))"
    assert wider(choice, downwards=True) == "choice(1e-05, 3.16e-05, 0.0001)"


def _budgets(results: StudyResults, **rule: object) -> Verdict:
    fairness = FairnessRules.model_validate({**FAIRNESS.model_dump(), **rule})
    return judge(results.model_copy(update={"fairness": fairness, "command": LR_RANK_SWEEP}))


def test_an_arm_with_a_smaller_budget_makes_the_verdict_provisional() -> None:
    """Five random trials against twelve; the command gives the arm as many."""
    full = _full((1e-4, 2e-4, 3e-4, 4e-4, 5e-3), best=3e-4, exhaustive=False)
    verdict = _budgets(make_results(_lora(12), full))
    assert "Full fine-tuning was searched with 5 trials and QLoRA with 12" in verdict.words
    (doubt,) = verdict.doubts
    assert doubt.command == "+experiment=lr_rank_sweep hydra.sweeper.arms.full.n_trials=12 -m"


def test_a_grid_walked_to_its_end_lacks_no_budget() -> None:
    """More trials of a complete grid would find nothing new; an unfinished grid lacks the rest."""
    full = _full((1e-4, 2e-4, 3e-4, 4e-4, 5e-3), best=3e-4)
    assert not _budgets(make_results(_lora(12), full)).provisional
    assert _budgets(make_results(_lora(12), full.model_copy(update={"n_trials": 9}))).provisional


def test_budgets_count_in_the_unit_of_the_rule() -> None:
    """12 trials of 10 s and 6 of 20 s are equal device-seconds and unequal trials."""
    full = _full((1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 5e-3), best=3e-4, exhaustive=False)
    results = make_results(_lora(12), full)
    assert not _budgets(results, equal="device_seconds").provisional
    assert _budgets(results, equal="trials").provisional


def test_too_few_finished_trials_make_the_verdict_provisional() -> None:
    """Fewer than fairness.min_finished; the command adds trials."""
    verdict = _budgets(make_results(_lora(3)), min_finished=4)
    assert "QLoRA has 3 finished trials, fewer than fairness.min_finished=4" in verdict.words
    assert verdict.doubts[0].command.endswith("hydra.sweeper.n_trials=4 -m")


def test_overrides_replace_their_like_before_the_flag() -> None:
    """A command has one value for a key, and ends with -m."""
    command = "+experiment=e training.learning_rate=1e-3 -m"
    found = with_override(command, "training.learning_rate", "choice(1, 2)")
    assert found == "+experiment=e 'training.learning_rate=choice(1, 2)' -m"


def test_the_document_is_json_with_figures_and_words() -> None:
    """results.json carries the verdict for machines."""
    document = json.loads(json.dumps(_judged(0.03, 0.07).document(), allow_nan=False))
    assert document["duels"][0]["difference"] == {"value": 0.05, "low": 0.03, "high": 0.07}
    assert document["duels"][0]["reference"]["trainable"] == 1000.0
    assert document["provisional"] is False
    assert document["words"].startswith("Full fine-tuning is ahead by 0.0500 nats")
