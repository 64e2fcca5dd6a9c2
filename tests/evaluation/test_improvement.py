"""Base against tuned, as report 002 of the seeds has it; lengths and endings of answers."""

from __future__ import annotations

import pytest

from sweeper.evaluation.answer_lengths import length_metrics
from sweeper.evaluation.generation import GeneratedAnswer
from sweeper.evaluation.improvement import as_markdown, improvements

BASE = {"eval/rouge1": 0.4732, "eval/rouge2": 0.22545, "eval/rougeL": 0.2856}
TUNED = {"eval/rouge1": 0.5323, "eval/rouge2": 0.28495, "eval/rougeL": 0.3521}


def test_percentages_come_from_unrounded_scores() -> None:
    """The published table (+12.5, +26.4, +23.3) needs digits that it does not print."""
    table = as_markdown(improvements(BASE, TUNED))
    assert "| eval/rouge1 | 0.4732 | 0.5323 | +12.5 % |" in table
    assert "+26.4 %" in table
    assert "| eval/rougeL | 0.2856 | 0.3521 | +23.3 % |" in table
    rounded = improvements({"eval/rouge2": 0.2255}, {"eval/rouge2": 0.2849})
    assert f"{rounded[0].percent:+.1f}" == "+26.3"


def test_positive_is_better_for_losses_too() -> None:
    """A loss that falls from 2 to 1.5 improved by 25 %; a ROUGE that falls got worse."""
    loss, rouge = improvements(
        {"eval/loss": 2.0, "eval/rouge1": 0.5, "cost/seconds": 1.0},
        {"eval/loss": 1.5, "eval/rouge1": 0.4, "cost/seconds": 2.0},
    )
    assert (loss.metric, loss.percent) == ("eval/loss", pytest.approx(25))
    assert (rouge.metric, rouge.percent) == ("eval/rouge1", pytest.approx(-20))


def test_nothing_is_no_base_for_a_percentage() -> None:
    """From 0 no percentage is possible; the table shows a dash, not a number."""
    rows = improvements({"eval/rouge2": 0.0}, {"eval/rouge2": 0.1})
    assert rows[0].percent is None
    assert as_markdown(rows).splitlines()[-1].endswith("| – |")


def test_lengths_and_endings() -> None:
    """Mean and median words of both sides, and shares of empty, ended and cut answers."""
    answers = [
        GeneratedAnswer("a b c", 4, True),
        GeneratedAnswer(" \n", 3, True),
        GeneratedAnswer("d", 9, False),
    ]
    found = length_metrics(answers, ["one two", "three", "four five six seven\neight nine"])
    assert found == pytest.approx(
        {
            "eval/response_words_mean": 4 / 3,
            "eval/response_words_median": 1,
            "eval/reference_words_mean": 3,
            "eval/reference_words_median": 2,
            "eval/response_empty_share": 1 / 3,
            "eval/response_eos_share": 2 / 3,
            "eval/response_limit_share": 1 / 3,
        }
    )
