"""The loss mask, for every format and template, and for any texts: answers and their ends, no more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeper.data.examples import DropCounts, Example, RawRow
from sweeper.data.row_formats import FORMATS, to_examples
from sweeper.data.templates import choose_template, turn_text
from sweeper.data.tokens import IGNORED, TokenizerSetup, Tokens, tokenize
from tests.data.chat import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, byte_level, metaspace, talk
from tests.data.test_row_formats import SAMPLES

NESTED = {
    "role": "prompter",
    "text": "Hi?",
    "replies": [{"role": "assistant", "text": "Yes.", "rank": 0, "replies": []}],
}
ROWS = {
    **{name: values for name, (values, _) in SAMPLES.items() if name != "text"},
    "oasst": {"message_tree_id": "t", "prompt": NESTED},
}
SOURCES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3}


def _runs(rows: list[Tokens], tokenizer: Any) -> list[str]:
    """Every run of positions that carry loss, decoded."""
    runs = []
    for row in rows:
        run: list[int] = []
        for label in [*row["labels"], IGNORED]:
            if label != IGNORED:
                run.append(label)
            elif run:
                runs.append(str(tokenizer.decode(run)))
                run = []
    return runs


def test_every_format_is_here() -> None:
    """Plain text has no answers; its blocks are tested with the lengths."""
    assert set(ROWS) == set(FORMATS) - {"text", "book"}, (
        "add a row of the format, and its messages, to SAMPLES of tests/data/test_row_formats.py"
    )


@pytest.mark.parametrize("template", ["instruction", "instruction_input", "plain", *SOURCES])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_under_every_template(name: str, template: str) -> None:
    """One run of loss: the answer and what ends it; the question is printed and carries none."""
    tokenizer = byte_level(chat_template=SOURCES.get(template, CHATML))
    (example,) = to_examples([RawRow(ROWS[name], "f:1")], name, {}, DropCounts())
    kind = "chat" if template in SOURCES else template
    chosen = choose_template(kind, name, tokenizer)
    rows = tokenize(example, TokenizerSetup(tokenizer), chosen, "completions")
    (run,) = _runs(rows, tokenizer)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>"}.get(
        template, "</s>"
    )
    thinking = "<think>\n\n</think>\n\n" if template == "qwen3" else ""
    assert run.strip() == thinking + example.completion + end
    text = tokenizer.decode(rows[0]["input_ids"])
    for turn in example.messages[:-1]:
        assert all(part in text for part in turn_text(turn).split("\n\n"))


TEXT = st.text(alphabet="ab .\n\té😀#:<|", min_size=1, max_size=8).filter(lambda text: text.strip())
TALKS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(
    lambda pairs: talk(*(text for pair in pairs for text in pair))
)
ENDS = {CHATML: "<|im_end|>", LLAMA3: "<|eot_id|>", GEMMA: "<end_of_turn>", MISTRAL: "</s>"}
CODECS = {
    (source, make): TokenizerSetup(make(adds="bos", chat_template=source))
    for source in ENDS
    for make in (byte_level, metaspace)
}


@settings(max_examples=40, deadline=None)
@given(TALKS)
@pytest.mark.parametrize("source", ENDS, ids=["chatml", "llama3", "gemma", "mistral"])
def test_any_conversation_under_a_chat_template(source: str, example: Example) -> None:
    """As many runs as answers, each the answer and the end of its turn, whatever the texts hold."""
    codec = CODECS[source, byte_level]
    chosen = choose_template("chat", "messages", codec.tokenizer)
    rows = tokenize(example, codec, chosen, "completions")
    answers = [turn.content for turn in example.messages if turn.role == "assistant"]
    runs = _runs(rows, codec.tokenizer)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        assert run.endswith(answer.strip() + ENDS[source]) or run.endswith(answer + ENDS[source])
        assert len(run.strip()) <= len(answer + ENDS[source]) + 1, "at most one token reaches over"


@settings(max_examples=40, deadline=None)
@given(TALKS)
@pytest.mark.parametrize("template", ["instruction", "plain"])
def test_any_conversation_under_our_own_templates(template: str, example: Example) -> None:
    """Exactly the answers, each with one end-of-text token: no token reaches over."""
    codec = CODECS[CHATML, byte_level]
    chosen = choose_template(template, "messages", codec.tokenizer)
    rows = tokenize(example, codec, chosen, "completions")
    answers = [f"{turn.content}</s>" for turn in example.messages if turn.role == "assistant"]
    assert _runs(rows, codec.tokenizer) == answers


@settings(max_examples=40, deadline=None)
@given(TALKS)
@pytest.mark.parametrize("source", ENDS, ids=["chatml", "llama3", "gemma", "mistral"])
def test_masks_nest(source: str, example: Example) -> None:
    """last_completion is the end of completions, and both are a part of everything."""
    codec = CODECS[source, metaspace]
    chosen = choose_template("chat", "messages", codec.tokenizer)
    last, some, every = (
        tokenize(example, codec, chosen, train_on)[0]
        for train_on in ("last_completion", "completions", "everything")
    )
    assert last["input_ids"] == some["input_ids"] == every["input_ids"]
    for narrow, wide in ((last, some), (some, every)):
        pairs = zip(narrow["labels"], wide["labels"], strict=True)
        assert all(one in (IGNORED, other) for one, other in pairs)
    assert any(label != IGNORED for label in last["labels"])
