"""The table of a winner's forms: differences have the intervals of paired examples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sweeper.core.outcome import ExampleLosses, ExampleScores
from tools.served_table import FORM_WORDS, ROUGE, FormJudgement, as_markdown, form_rows

ROWS = 40


def judgement(form: str, seed: int, shift: float = 0.0, rows: int = ROWS) -> FormJudgement:
    """Return a form whose losses are those of seed 0, changed by noise and a shift."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    tokens = shared.integers(3, 30, size=rows)
    nll = tokens * shared.uniform(1, 4, size=rows) + own.normal(shift, 0.2, size=rows) * tokens
    scores = np.clip(shared.uniform(0, 1, size=rows) + own.normal(0, 0.05, size=rows), 0, 1)
    return FormJudgement(
        form,
        ExampleLosses(nll=tuple(nll.tolist()), tokens=tuple(tokens.tolist())),
        tuple(
            f"answer {place}" if place % (seed + 1) == 0 else f"{form} {place}"
            for place in range(rows)
        ),
        tuple(place % 4 > 0 for place in range(rows)),
        ExampleScores(metric=ROUGE, values=tuple(scores.tolist()), weights=(1.0,) * rows),
        seconds=1.5,
        mib=None if form == "trained" else 100.0,
    )


def test_loss_differences_are_those_of_paired_rows() -> None:
    """The interval is the delta method's for a ratio of sums, with Student's t, computed apart."""
    judged = [judgement("trained", 0), judgement("Q8_0", 1), judgement("Q4_K_M", 2, shift=0.3)]
    first, *others = form_rows(judged)
    assert first.loss_change is None
    assert first.rouge_change is None
    tokens = np.array(judged[0].losses.tokens)
    for row, each in zip(others, judged[1:], strict=True):
        apart = np.array(each.losses.nll) - np.array(judged[0].losses.nll)
        mean = apart.sum() / tokens.sum()
        residuals = apart - mean * tokens
        error = np.sqrt(ROWS / (ROWS - 1) * (residuals**2).sum()) / tokens.sum()
        half = stats.t.ppf(0.975, ROWS - 1) * error
        change = row.loss_change
        assert change is not None
        assert change.value == pytest.approx(row.loss - first.loss) == pytest.approx(mean)
        assert (change.low, change.high) == pytest.approx((mean - half, mean + half))


def test_rouge_differences_are_those_of_paired_answers() -> None:
    """The interval of a mean of scores is that of scipy's paired t test."""
    judged = [judgement("trained", 0), judgement("F16", 1)]
    change = form_rows(judged)[1].rouge_change
    assert change is not None
    found = stats.ttest_rel(judged[1].rouge.values, judged[0].rouge.values).confidence_interval()
    assert (change.low, change.high) == pytest.approx((found.low, found.high))


def test_equal_forms_have_no_difference_and_the_same_answers() -> None:
    """A form with the same losses and answers differs by zero, with an interval of zero width."""
    same = judgement("trained", 0)
    row = form_rows([same, judgement("merged", 0)])[1]
    assert row.loss_change is not None
    assert (row.loss_change.low, row.loss_change.value, row.loss_change.high) == (0, 0, 0)
    assert row.same_answers == row.answers == ROWS
    assert row.ended_share == 0.75


def test_forms_of_other_rows_are_refused() -> None:
    """Losses over other tokens are never subtracted from each other."""
    with pytest.raises(ValueError, match="different examples"):
        form_rows([judgement("trained", 0), judgement("F16", 0, rows=ROWS - 1)])


def test_the_table_has_a_line_for_each_form() -> None:
    """Every form is named, with both differences and the number of equal answers."""
    judged = [judgement(form, number) for number, form in enumerate(FORM_WORDS)]
    text = as_markdown(form_rows(judged))
    lines = text.splitlines()
    assert len(lines) == 2 + len(FORM_WORDS)
    assert all(words in line for words, line in zip(FORM_WORDS.values(), lines[2:], strict=True))
    assert "40 of 40" in lines[2]
    assert "20 of 40" in lines[3]
    assert lines[3].count(" to ") == 2


def test_a_single_row_has_no_interval() -> None:
    """One row and one answer give a difference, and no interval."""
    judged = [judgement("trained", 0, rows=1), judgement("F16", 1, rows=1)]
    assert " to " not in as_markdown(form_rows(judged))
