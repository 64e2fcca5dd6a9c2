"""Qualitative prompts: the proof of absence, and tables that any answer leaves intact."""

from __future__ import annotations

import pytest

from sweeper.config.settings import QualitativePrompt
from sweeper.core.errors import DataError
from sweeper.evaluation.sample_answers import (
    SampleAnswer,
    as_json,
    as_markdown,
    pair_answers,
    require_unseen,
    seen_in_training,
)
from tests.conftest import make_settings

HAIKU = QualitativePrompt(category="creative", prompt="Write a haiku about the ocean.")
AI = QualitativePrompt(category="explanation", prompt="What is AI?")
TEMPLATE = "### Instruction:\n{}\n\n### Input:\n\n\n### Response:\n"


@pytest.mark.parametrize(
    "text",
    [
        "Write a haiku about the ocean.",
        TEMPLATE.format("Write a haiku about the ocean."),
        "write a  haiku\nabout the OCEAN.",
        "Please: Write a haiku about the ｏｃｅａｎ. Thank you.",
    ],
)
def test_a_prompt_in_training_is_found(text: str) -> None:
    """Alone, within a template, in other white space, case or Unicode form."""
    assert seen_in_training([HAIKU, AI], ["something else", text]) == [HAIKU]
    with pytest.raises(
        DataError, match=r"1 of 2 prompts occur in the training split.*creative: 'Write"
    ):
        require_unseen([HAIKU, AI], [text])


def test_prompts_that_only_resemble_are_absent() -> None:
    """Another ocean poem and half of a prompt are no proof against it."""
    training = ["Write a haiku about the oceans", "Write a haiku", "What is AI good for?"]
    require_unseen([HAIKU, AI], training)
    require_unseen([], training)


def test_shipped_prompts_are_of_three_kinds() -> None:
    """The real preset asks for an explanation, something creative, and a classification."""
    prompts = make_settings("evaluation=real").evaluation.prompts
    assert [asked.category for asked in prompts] == ["explanation", "creative", "classification"]


def test_answers_stand_beside_their_prompts() -> None:
    """Pairs keep the order of prompts; a missing answer is an error."""
    samples = pair_answers([HAIKU, AI], ["b1", "b2"], ["t1", "t2"])
    assert samples[1] == SampleAnswer("explanation", "What is AI?", "b2", "t2")
    assert as_json(samples)[0] == {
        "category": "creative",
        "prompt": HAIKU.prompt,
        "base": "b1",
        "tuned": "t1",
    }
    with pytest.raises(ValueError, match="shorter"):
        pair_answers([HAIKU, AI], ["b1", "b2"], ["t1"])


def test_no_answer_breaks_the_table() -> None:
    """Pipes, line breaks, backslashes and HTML stay inside their cell."""
    text = as_markdown([SampleAnswer("a", "x | y", "one\n\ntwo", "<b>&\\|</b>\n")])
    rows = text.splitlines()
    assert len(rows) == 3
    assert rows[2] == "| a | x \\| y | one<br><br>two | &lt;b>&amp;\\\\\\|&lt;/b> |"
