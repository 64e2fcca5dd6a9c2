"""The sentence about what more trials would bring."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from sweeper.config.settings import Objective
from sweeper.core.outcome import Outcome
from sweeper.reporting.finalist_results import FinalistRanking, FinalistResult, SeedRepeat
from sweeper.reporting.latex_report import latex_report
from sweeper.reporting.live_view import print_results
from sweeper.reporting.result_tables import markdown_report
from sweeper.reporting.results import StudyResults, from_document, to_document
from sweeper.reporting.verdict import judge
from sweeper.search.search_outlook import SearchOutlook
from tests.reporting.studies import LOSS, ROUGE, ROUGE_FACTS, make_arm, make_results, make_trial

FOUND = SearchOutlook(after=12, trials=12, gain=0.002, low=0.0, high=0.006)
LOWERED = (
    "12 more trials would be expected to lower the eval loss of QLoRA by about 0.0020 nats (0.0000 to "
    "0.0060; a factor of 1.002 in perplexity), a guess of a model of its trials."
)


def _results(objective: Objective = LOSS, **fields: Any) -> StudyResults:
    facts = ROUGE_FACTS if objective is ROUGE else None
    known = {} if facts is None else {"facts": facts}
    trials = [make_trial("lora", n, "finished", 0.4 + 0.1 * n) for n in range(2)]
    arm = make_arm("lora", trials, objective=objective, **known)
    return make_results(arm.model_copy(update={"outlook": FOUND, **fields}))


def _final(*values: float) -> FinalistRanking:
    repeats = tuple(
        SeedRepeat(seed=seed, outcome=Outcome(cause="finished", best_value=value))
        for seed, value in enumerate(values)
    )
    return FinalistRanking(finalists=(FinalistResult(number=0, repeats=repeats),), winner=0)


def test_each_report_says_it_once() -> None:
    """The verdict, the Markdown, the terminal of 80 columns and the LaTeX appendix."""
    results = _results()
    assert judge(results).words.count(LOWERED) == 1
    assert markdown_report(results, judge(results)).count(LOWERED) == 1
    assert latex_report([results]).count("12 more trials would be expected") == 1
    console = Console(width=80, record=True, force_terminal=False)
    print_results(results, console)
    assert " ".join(console.export_text().split()).count(LOWERED) == 1


def test_a_maximised_objective_is_raised() -> None:
    """Without a unit, and without a factor in perplexity."""
    words = judge(_results(ROUGE)).words
    assert (
        "12 more trials would be expected to raise the eval rougeL of QLoRA by about 0.0020 (0.0000 to "
        "0.0060), a guess of a model of its trials." in words
    )


@pytest.mark.parametrize(("values", "said"), [((0.40, 0.41), True), ((0.40, 0.401), False)])
def test_a_gain_below_what_seeds_differ_by_is_called_that(
    values: tuple[float, float], said: bool
) -> None:
    """Two seeds 0.01 apart deviate by 0.0071, two that are 0.001 apart by 0.0007."""
    words = judge(_results(final=_final(*values))).words
    assert LOWERED in words
    assert ("less than its seeds differ by (standard deviation 0.0071)" in words) is said
    assert "its seeds differ" not in judge(_results(final=_final(0.4))).words


def test_without_a_guess_nothing_is_said() -> None:
    """Results of before have no such key, and their words are the same."""
    results = _results(outlook=None)
    document = to_document(results)
    del document["arms"]["lora"]["outlook"]
    assert from_document(document) == results
    assert "more trial" not in judge(results).words
    assert from_document(to_document(_results())).arms[0].outlook == FOUND
