"""The picture of the answer on the first screen, and the words beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sweeper.core.paths import StudyFolder
from sweeper.evaluation.sample_answers import SampleAnswer
from sweeper.reporting.answer_picture import answer_picture
from sweeper.reporting.html_page import FOLDED_CHARS, PageStudy, page
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.report_evidence import ReportEvidence
from sweeper.reporting.results import StudyResults
from sweeper.reporting.verdict import judge
from tests.reporting.pages import Page
from tests.reporting.studies import ROUGE, ROUGE_FACTS, make_arm, make_results, two_arms
from tests.reporting.test_result_tables import CONTRAST

CHANGES = (
    IntervalEstimate(value=-0.44, low=-0.48, high=-0.40),
    IntervalEstimate(value=-0.49, low=-0.52, high=-0.46),
)
JUDGED = two_arms(4.05, 4.0).model_copy(
    update={"contrasts": (CONTRAST.model_copy(update={"changes": CHANGES}),)}
)


def picture(results: StudyResults) -> str:
    """The picture of a study's answer as SVG."""
    found = answer_picture(results, judge(results))
    assert found is not None
    assert found.svg is not None
    return found.svg


def whiskers(svg: str) -> list[tuple[float, float]]:
    """The ends of the intervals, from left to right, by row."""
    found = re.findall(r'class="l strong plain s\d" d="M([\d.]+) \d+H([\d.]+)', svg)
    return [(float(low), float(high)) for low, high in found]


def test_base_and_arms_stand_on_one_axis_with_intervals() -> None:
    """Three points on the test split, two whiskers above, and one for the difference below."""
    svg = picture(JUDGED)
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"untuned base", "QLoRA", "full fine-tuning", "4.5000", "4.0600", "4.0100"} <= {*texts}
    assert {"+0.0500", "minus full fine-tuning, in nats"} <= {*texts}
    own, reference, _ = whiskers(svg)
    # Half widths of 0.04 and 0.03 nats on the same axis.
    assert (own[1] - own[0]) / (reference[1] - reference[0]) == pytest.approx(4 / 3, rel=0.02)
    assert sum(reference) < sum(own)


def test_a_split_that_chose_the_winners_gets_no_interval() -> None:
    """Without a look at the test split the values are the validation split's, and that is said."""
    found = answer_picture(two_arms(4.05, 4.0), judge(two_arms(4.05, 4.0)))
    assert found is not None
    assert found.svg is not None
    assert not whiskers(found.svg)
    assert found.title == "The validation split"
    assert "no interval" in found.caption


def test_results_of_before_have_the_interval_of_the_difference_only() -> None:
    """A contrast that an earlier version stored draws points, and one whisker below."""
    older = JUDGED.model_copy(update={"contrasts": (CONTRAST,)})
    assert len(whiskers(picture(older))) == 1


def test_nothing_judged_is_no_picture() -> None:
    """A study without a finished trial has no point to draw."""
    empty = make_results(make_arm("lora", []))
    assert answer_picture(empty, judge(empty)) is None


def test_a_difference_of_another_metric_is_no_factor_in_perplexity() -> None:
    """Nats have their factor in perplexity on the first screen, a ROUGE has none."""
    assert "factor of 1.051 in perplexity" in judge(JUDGED).words
    rouge = two_arms(0.4, 0.5, objective=ROUGE, facts=ROUGE_FACTS)
    assert "perplexity" not in judge(rouge).words
    assert "perplexity" not in picture(rouge)


def test_long_answers_are_folded_and_words_explained() -> None:
    """A long answer is whole behind its first words, and the first screen says what its terms mean."""
    long = "word " * 100
    samples = {"lora": (SampleAnswer("c", "Prompt", "short", long),)}
    study = PageStudy(JUDGED, StudyFolder(Path("outputs/mine")), ReportEvidence({}, samples))
    found = Page.read(page([study]))
    folded = [e for e in found.all("details") if "td" in e.parents]
    assert len(folded) == 1
    assert long.strip() in folded[0].text
    assert len(long) > FOLDED_CHARS > len("short")
    (asides,) = found.all("p", "asides")
    assert "nats: unit of a loss" in asides.text
    assert "95 % interval: range" in asides.text
