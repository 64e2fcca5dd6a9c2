"""Winners against each other on the test split: from examples to contrasts, or why there are none."""

from __future__ import annotations

import pytest

from sweeper.core.outcome import ExampleLosses, HeldOutLosses, Outcome
from sweeper.reporting.finalist_results import (
    ArmConclusion,
    FinalistRanking,
    FinalistResult,
    SeedRepeat,
)
from sweeper.reporting.held_out_results import NO_FIGURES, NO_TEST_SPLIT, OTHER_EXAMPLES, settle
from sweeper.reporting.result_tables import comparison, finalists
from sweeper.reporting.results import StudyResults, from_document, to_document
from sweeper.reporting.verdict import judge
from tests.reporting.studies import make_results, two_arms

TOKENS = (2, 3, 5)


def _examples(loss: float, tokens: tuple[int, ...] = TOKENS) -> ExampleLosses:
    """The same loss a token on every example."""
    return ExampleLosses(nll=tuple(loss * count for count in tokens), tokens=tokens)


def _final(*losses: float, base: float = 4.6, tokens: tuple[int, ...] = TOKENS) -> ArmConclusion:
    """Trial 0 won with seeds of these test losses."""
    outcome = Outcome(cause="finished", best_value=4.0)
    repeats = tuple(SeedRepeat(seed=seed, outcome=outcome) for seed in range(len(losses)))
    final = FinalistRanking(finalists=(FinalistResult(number=0, repeats=repeats),), winner=0)
    seeds = {seed: HeldOutLosses(test=_examples(loss, tokens)) for seed, loss in enumerate(losses)}
    return ArmConclusion.judged(final, seeds, HeldOutLosses(test=_examples(base, tokens)))


def _with_general(found: ArmConclusion, untuned: float, *losses: float) -> ArmConclusion:
    """The same, judged on general text as well."""
    seeds = {
        seed: found.seeds[seed].model_copy(update={"general": _examples(loss)})
        for seed, loss in enumerate(losses)
    }
    base = found.untuned.model_copy(update={"general": _examples(untuned)})
    return ArmConclusion.judged(found.final, seeds, base)


def _settled(**finals: ArmConclusion) -> StudyResults:
    return settle(two_arms(4.05, 4.0), finals)


def test_means_over_seeds_are_compared_against_the_references_base() -> None:
    """4.1 and 4.2 against 4.0: 0.15 nats behind, and 75 % of the way from the base at 4.6."""
    results = _settled(lora=_final(4.1, 4.2, base=4.7), full=_final(4.0))
    (found,) = results.contrasts
    assert found.losses == pytest.approx((4.15, 4.0))
    assert found.difference.value == pytest.approx(0.15)
    assert found.retained is not None
    assert found.retained.value == pytest.approx(75.0)
    assert (found.seeds, found.examples, found.base_loss) == ((2, 1), 3, pytest.approx(4.6))
    assert found.noise == (pytest.approx(0.1 / 2**0.5), None)
    assert results.untested is None


def test_tables_show_the_tested_and_every_seed() -> None:
    """Test losses of both arms and of each base as it is held; the finalists by seed."""
    results = _settled(lora=_final(4.1, 4.2, base=4.7), full=_final(4.0))
    sheet = comparison(results)
    at = sheet.columns.index("test loss")
    assert [row[at] for row in sheet.rows] == ["4.7000", "4.6000", "4.1500", "4.0000"]
    found = finalists(results)
    assert found is not None
    assert found.rows[0] == ("QLoRA", "0", "2 of 2", "4.0000 4.0000", "4.0000", "0.0000", "won")
    assert finalists(two_arms(4.05, 4.0)) is None


def test_other_examples_are_not_compared() -> None:
    """Another tokenizer counts other tokens: no contrast, and the verdict says why."""
    results = _settled(lora=_final(4.1, tokens=(2, 3, 6)), full=_final(4.0))
    assert results.contrasts == ()
    assert f"Not evaluated on the test split: {OTHER_EXAMPLES}." in judge(results).words


def test_an_arm_without_figures_leaves_the_verdict_on_validation() -> None:
    """Its artifact could not be read."""
    broken = ArmConclusion(_final(4.1).final)
    results = _settled(lora=broken, full=_final(4.0))
    assert (results.contrasts, results.untested) == ((), NO_FIGURES)
    assert judge(results).duels[0].split == "validation"


def test_without_a_test_split_there_is_nothing_to_compare_on() -> None:
    """rows["test"] is 0."""
    lora, full = two_arms(4.05, 4.0).arms
    none = lora.facts.model_copy(update={"rows": {"train": 10, "validation": 2, "test": 0}})
    results = make_results(
        lora.model_copy(update={"facts": none}), full.model_copy(update={"facts": none})
    )
    final = ArmConclusion(_final(4.1).final.model_copy(update={"test_losses": {}}))
    assert settle(results, {"lora": final, "full": final}).untested == NO_TEST_SPLIT


def test_an_arm_alone_has_its_test_loss_in_words() -> None:
    """No contrast is missed where there is nobody to compare with."""
    results = settle(two_arms(4.05, None), {"lora": _final(4.1, 4.2)})
    assert (results.contrasts, results.untested) == ((), None)
    words = judge(results).words
    assert "test loss of 4.1500 against the untuned base's 4.6000 (mean of 2 seeds)" in words


def test_forgetting_is_the_loss_on_general_text_above_each_arms_own_base() -> None:
    """Means of 3.62 and 3.8 over bases of 3.6 and 3.5: 0.02 and 0.3 nats, in words and table."""
    lora = _with_general(_final(4.1, 4.2), 3.6, 3.61, 3.63)
    results = _settled(lora=lora, full=_with_general(_final(4.0), 3.5, 3.8))
    assert [(found.arm, found.difference.value) for found in results.forgetting] == [
        ("lora", pytest.approx(0.02)),
        ("full", pytest.approx(0.3)),
    ]
    assert lora.final.metrics == pytest.approx(
        {
            **{"test/loss": 4.15, "test/perplexity": 63.434, "general/loss": 3.62},
            **{"general/untuned_loss": 3.6, "general/forgetting": 0.02},
        },
        rel=1e-4,
    )
    sheet = comparison(results)
    at = sheet.columns.index("forgetting")
    assert [row[at] for row in sheet.rows] == ["–", "–", "+0.0200", "+0.3000"]
    words = judge(results).words
    assert "Forgetting (loss on general text minus the untuned base's): QLoRA +0.0200" in words
    assert "full fine-tuning +0.3000 (95 % interval +0.3000 to +0.3000; a factor of 1.350" in words
    again = from_document(to_document(results))
    assert again.forgetting == results.forgetting


def test_unmeasured_forgetting_is_not_spoken_of() -> None:
    """Without general text: no figure, no column, no sentence."""
    results = _settled(lora=_final(4.1), full=_final(4.0))
    assert results.forgetting == ()
    assert "forgetting" not in comparison(results).columns
    assert "Forgetting" not in judge(results).words


def test_results_survive_the_file() -> None:
    """Written and read back, finals and contrasts are what they were."""
    results = _settled(lora=_final(4.1, 4.2), full=_final(4.0))
    again = from_document(to_document(results))
    assert again.contrasts == results.contrasts
    assert [arm.final for arm in again.arms] == [arm.final for arm in results.arms]
