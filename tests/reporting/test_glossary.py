"""The terms that a report explains."""

from __future__ import annotations

from typing import get_args

import pytest

from sweeper.core.outcome import Cause
from sweeper.reporting.glossary import TERMS, terms_in
from sweeper.reporting.result_tables import markdown_report
from sweeper.reporting.verdict import judge
from tests.reporting.studies import two_arms
from tests.reporting.test_html_page import Page, render


def test_every_outcome_of_a_trial_is_explained() -> None:
    """Leaderboards show outcomes by their codes, of which only `finished` explains itself."""
    assert set(get_args(Cause)) - {"finished"} <= set(TERMS)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("QLoRA is ahead by 0.05 nats.", ["nats", "ahead"]),
        ("3 arms, one alarm", ["arm"]),
        ("noise floor (sd)", ["Noise floor", "sd"]),
        ("early_stopped, not stopped", ["early_stopped"]),
        ("nothing here", []),
    ],
)
def test_terms_are_found_as_whole_words(text: str, terms: list[str]) -> None:
    """Plurals and capitals count, parts of longer words do not."""
    assert [term for term, _ in terms_in(text)] == terms


def test_report_and_page_explain_the_terms_that_they_use() -> None:
    """Both end with the same terms, and a term that is not used is not explained."""
    results = two_arms(None, 4.0)
    text = markdown_report(results, judge(results))
    assert "- **arm**: one training method" in text
    assert "- **oom**: ran out of memory" in text
    assert "**pruned**" not in text
    page = Page.read(render(results))
    shown = [name.text for name in page.all("dt") if name.text in TERMS]
    assert shown == [line[4:].split("**")[0] for line in text.splitlines() if line[:4] == "- **"]
