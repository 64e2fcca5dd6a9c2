"""Reports of studies that went otherwise than planned say what there is to say, and nothing else."""

from __future__ import annotations

from sweeper.reporting.results import StudyResults
from tests.reporting.pages import Page
from tests.reporting.studies import LORA_COSTS, make_arm, make_results, make_trial, two_arms
from tests.reporting.test_html_page import all_failed, curves, many, render


def _page(results: StudyResults) -> Page:
    return Page.read(render(results))


def _words(page: Page) -> str:
    return page.all("p", "words")[0].text


def _tiles(page: Page) -> list[str]:
    return [tile.text for tile in page.all("strong")]


def test_without_a_baseline_the_untuned_base_is_the_measure() -> None:
    """The gain over it, both values as tiles, and no share of anything."""
    trials = [make_trial("lora", n, "finished", 4.1 + n / 10, LORA_COSTS) for n in range(4)]
    page = _page(make_results(make_arm("lora", trials)))
    assert "lowers the untuned base's eval loss by 0.400 nats" in _words(page)
    assert "no other arm with a finished trial to compare it with" in _words(page)
    assert _tiles(page) == ["4.1000", "4.5000"]
    assert "retains" not in _words(page)


def test_one_trial_is_one_trial() -> None:
    """In the singular; it is told that one seed decides little, with the command for another."""
    page = _page(make_results(make_arm("lora", [make_trial("lora", 0, "finished", 4.1)])))
    captions = [caption.text for caption in page.all("caption")]
    assert "lora: 1 trial, 0.0 s in total" in captions
    steps = [step.text for step in page.all("li") if "ol" in step.parents]
    assert len(steps) == 1
    assert "was trained with one seed" in steps[0]
    assert "seed=1" in steps[0]


def test_where_all_failed_the_page_tells_why_and_what_to_do() -> None:
    """No figure is claimed; causes are counted; no trial is offered for reproduction."""
    page = _page(all_failed())
    words = "No trial has finished, so there is nothing to compare. QLoRA has no finished trial (3 oom)."
    assert _words(page) == words
    assert _tiles(page) == []
    assert "why these settings" not in "".join(each.text for each in page.all("summary"))
    steps = [step.text for step in page.all("li") if "ol" in step.parents]
    assert "3 of 3 trials ran out of memory" in steps[0]
    assert not [code for code in page.all("code") if "reproduce" in code.text]


def test_an_arm_that_only_failed_leaves_the_other_its_answer() -> None:
    """Full fine-tuning is there; LoRA ran out of memory."""
    page = _page(two_arms(None, 4.0))
    assert "QLoRA has no finished trial (1 oom)." in _words(page)
    assert _tiles(page) == ["4.0000", "4.5000"]


def test_a_thousand_trials_are_summed_up() -> None:
    """Every trial has its row; pictures say which of them they show."""
    results = many(1000)
    page = Page.read(render(results, curves(results)))
    rows = [row for row in page.all("tr") if "tbody" in row.parents]
    assert len(rows) > 1001
    captions = " ".join(caption.text for caption in page.all("figcaption"))
    assert "The best 60 of 1001 trials are shown." in captions
    assert "The best 300 of 1000 trials are shown." in captions


def test_equal_values_have_no_winner() -> None:
    """A difference that four digits do not show is nobody's lead."""
    words = _words(_page(two_arms(4.0, 4.0)))
    assert "Undecided: the validation loss of QLoRA minus full fine-tuning's is +0.0000" in words
    assert "is ahead" not in words
