"""What every template prints, and what of it is learned, shown with « » around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sweeper.core.errors import DataError
from sweeper.data.data_card import show
from sweeper.data.examples import Example
from sweeper.data.templates import JinjaTemplate, TrainOn, choose_template, render, template_problem
from sweeper.data.tokens import TokenizerSetup, encode_prompt, tokenize
from sweeper.data.turns import UnusableRow
from tests.data.chat import (
    CHATML,
    GEMMA,
    LLAMA3,
    MARKED,
    MISTRAL,
    QWEN3,
    UNTOLD,
    byte_level,
    metaspace,
    talk,
    task,
)

SINGLE = talk("Hi?", "Yes.")
DOUBLE = talk("Hi?", "Yes.", "Why?", "So.")
WITH_SYSTEM = talk("Hi?", "Yes.", "Why?", "So.", system="Be.")


def _learned(
    example: Example, template: str, train_on: TrainOn = "completions", **options: Any
) -> list[str]:
    codec = TokenizerSetup(byte_level(**options))
    chosen = choose_template(template, example.format, codec.tokenizer)
    return [show(row, codec.tokenizer) for row in tokenize(example, codec, chosen, train_on)]


INSTRUCTION: list[tuple[str, Example, TrainOn, str]] = [
    (
        "instruction",
        task("Add.", "1, 2", "3"),
        "completions",
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n«3</s>»",
    ),
    (
        "instruction",
        task("Add.", "", "3"),
        "completions",
        "### Instruction:\nAdd.\n\n### Response:\n«3</s>»",
    ),
    (
        "instruction_input",
        task("Add.", "", "3"),
        "completions",
        "### Instruction:\nAdd.\n\n### Input:\n\n\n### Response:\n«3</s>»",
    ),
    (
        "instruction",
        WITH_SYSTEM,
        "completions",
        "Be.\n\n### Instruction:\nHi?\n\n### Response:\n«Yes.</s>»\n\n"
        "### Instruction:\nWhy?\n\n### Response:\n«So.</s>»",
    ),
    (
        "instruction",
        DOUBLE,
        "last_completion",
        "### Instruction:\nHi?\n\n### Response:\nYes.</s>\n\n"
        "### Instruction:\nWhy?\n\n### Response:\n«So.</s>»",
    ),
    ("plain", SINGLE, "completions", "Hi?«Yes.</s>»"),
    ("plain", DOUBLE, "completions", "Hi?«Yes.</s>»Why?«So.</s>»"),
    ("plain", task("Add.", "1, 2", "3"), "completions", "Add.\n\n1, 2«3</s>»"),
]


@pytest.mark.parametrize(("template", "example", "train_on", "expected"), INSTRUCTION)
def test_own_template_prints_and_masks(
    template: str, example: Example, train_on: TrainOn, expected: str
) -> None:
    """Alpaca's short form to the letter; every trained answer ends with the end-of-text token."""
    assert _learned(example, template, train_on) == [expected]


@pytest.mark.parametrize("template", ["instruction", "plain", "chat"])
def test_everything_is_all_but_the_first_token(template: str) -> None:
    """train_on=everything: labels are the ids, but for the first, which nothing stands before."""
    codec = TokenizerSetup(byte_level(chat_template=LLAMA3))
    chosen = choose_template(template, "messages", codec.tokenizer)
    (row,) = tokenize(WITH_SYSTEM, codec, chosen, "everything")
    assert row["labels"] == [-100, *row["input_ids"][1:]]


CHAT: list[tuple[str, str, Example, TrainOn, list[str]]] = [
    (
        "chatml",
        CHATML,
        WITH_SYSTEM,
        "completions",
        [
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
            "<|im_start|>assistant\n«Yes.<|im_end|>»\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n«So.<|im_end|>»\n"
        ],
    ),
    (
        "llama3",
        LLAMA3,
        DOUBLE,
        "completions",
        [
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»"
        ],
    ),
    (
        "llama3",
        LLAMA3,
        DOUBLE,
        "last_completion",
        [
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»"
        ],
    ),
    (
        "gemma",
        GEMMA,
        DOUBLE,
        "completions",
        [
            "<s><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n«So.<end_of_turn>»\n"
        ],
    ),
    (
        "mistral",
        MISTRAL,
        DOUBLE,
        "completions",
        ["<s>[INST] Hi?[/INST]« Yes.</s>»[INST] Why?[/INST]« So.</s>»"],
    ),
    (
        "mistral moves the system turn: one row per answer",
        MISTRAL,
        WITH_SYSTEM,
        "completions",
        [
            "<s>[INST] Be.\n\nHi?[/INST]« Yes.</s>»",
            "<s>[INST] Hi?[/INST] Yes.</s>[INST] Be.\n\nWhy?[/INST]« So.</s>»",
        ],
    ),
    (
        "qwen3 strips earlier thinking: one row per answer",
        QWEN3,
        talk("Hi?", "<think>\nHm.\n</think>\n\nYes.", "Why?", "So."),
        "completions",
        [
            "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
            "«<think>\nHm.\n</think>\n\nYes.<|im_end|>»\n",
            "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            "«<think>\n\n</think>\n\nSo.<|im_end|>»\n",
        ],
    ),
    (
        "marked by the template",
        MARKED,
        DOUBLE,
        "completions",
        ["Hi?\nturn 4\n«Yes.<|im_end|>»\nWhy?\nturn 4\n«So.<|im_end|>»\n"],
    ),
    (
        "marked by the template",
        MARKED,
        DOUBLE,
        "last_completion",
        ["Hi?\nturn 4\nYes.<|im_end|>\nWhy?\nturn 4\n«So.<|im_end|>»\n"],
    ),
]


@pytest.mark.parametrize(
    ("name", "source", "example", "train_on", "expected"), CHAT, ids=lambda value: str(value)[:20]
)
def test_chat_template_is_masked_by_its_own_prefixes(
    name: str, source: str, example: Example, train_on: TrainOn, expected: list[str]
) -> None:
    """Answers and their end-of-turn token are learned, headers and what stands behind are not."""
    assert _learned(example, "chat", train_on, chat_template=source) == expected


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3])
def test_chat_ids_are_those_of_apply_chat_template(make: Any, source: str) -> None:
    """Whatever the mask does, the ids are the library's own, with one begin-of-text token at most."""
    tokenizer = make(adds="bos", chat_template=source)
    template = choose_template("chat", "messages", tokenizer)
    turns = [{"role": turn.role, "content": turn.content} for turn in DOUBLE.messages]
    row = tokenize(DOUBLE, TokenizerSetup(tokenizer), template, "completions")[-1]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == expected
    assert row["input_ids"].count(tokenizer.bos_token_id) == ("bos_token" in source)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3])
def test_prompt_is_what_generation_starts_from(source: str) -> None:
    """The prompt of an example is the chat template with add_generation_prompt, ids and all."""
    tokenizer = byte_level(adds="bos", chat_template=source)
    template = choose_template("chat", "messages", tokenizer)
    turns = [{"role": turn.role, "content": turn.content} for turn in DOUBLE.messages[:-1]]
    prompt = encode_prompt(DOUBLE, TokenizerSetup(tokenizer), template)
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert prompt.input_ids == expected["input_ids"]
    assert prompt.reference == "So."


def test_template_that_refuses_is_a_reason() -> None:
    """Gemma's exception for system turns becomes the drops's reason."""
    with pytest.raises(UnusableRow, match="System role not supported"):
        _learned(WITH_SYSTEM, "chat", chat_template=GEMMA)


def test_template_that_does_not_tell_its_answers_is_refused() -> None:
    """A generation prompt that answers do not begin with, and no marks: no mask is guessed."""
    with pytest.raises(UnusableRow, match=r"data\.template=instruction"):
        _learned(DOUBLE, "chat", chat_template=UNTOLD)


def test_chat_without_a_chat_template_names_the_ways_out() -> None:
    """The error says what to give instead."""
    with pytest.raises(DataError, match=r"no chat template.*data\.template=instruction"):
        choose_template("chat", "messages", byte_level())


AUTO = [
    ("messages", CHATML, "chat"),
    ("sharegpt", CHATML, "chat"),
    ("messages", None, "instruction"),
    ("alpaca", CHATML, "instruction"),
    ("question_answer", None, "instruction"),
    ("flan", CHATML, "instruction"),
    ("prompt_completion", CHATML, "plain"),
    ("text", CHATML, "plain"),
]


@pytest.mark.parametrize(("format_name", "source", "expected"), AUTO)
def test_auto_template(format_name: str, source: str | None, expected: str) -> None:
    """Conversations get the chat template where there is one; authored prompts stand as they are."""
    tokenizer = byte_level(chat_template=source) if source else byte_level()
    assert choose_template("auto", format_name, tokenizer).name == expected


def test_plain_text_takes_no_question_template() -> None:
    """data.template=instruction with data.format=text is an error, not a guess."""
    with pytest.raises(DataError, match="format=text has none"):
        choose_template("instruction", "text", byte_level())


def test_jinja_file_is_rendered_with_chat_variables(tmp_path: Path) -> None:
    """A user's file: messages, bos_token, Alpaca's parts; one begin, one end, the answer learned."""
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.instruction }}"
        "{% if m.input %} ({{ m.input }}){% endif %} A:{% else %} {{ m.content }}{% endif %}"
        "{% endfor %}",
        encoding="utf-8",
    )
    expected = ["<s>Q: Add. (1, 2) A:« 3</s>»"]
    assert _learned(task("Add.", "1, 2", "3"), str(path), adds="bos") == expected
    path.write_text(path.read_text().replace("{{ bos_token }}", ""), encoding="utf-8")
    assert _learned(task("Add.", "1, 2", "3"), str(path), adds="bos") == expected


def test_jinja_file_runs_in_a_sandbox(tmp_path: Path) -> None:
    """A template cannot reach Python through an attribute."""
    path = tmp_path / "evil.jinja"
    path.write_text("{{ messages.__class__.__mro__ }}", encoding="utf-8")
    with pytest.raises(UnusableRow, match="unsafe"):
        _learned(SINGLE, str(path))


def test_broken_jinja_file_names_its_line(tmp_path: Path) -> None:
    """A syntax error is the file's, once, not every row's."""
    path = tmp_path / "broken.jinja"
    path.write_text("a\n{% for %}", encoding="utf-8")
    with pytest.raises(DataError, match=r"broken.jinja: line 2"):
        _learned(SINGLE, str(path))


def test_unknown_template_is_a_problem_before_anything_is_loaded() -> None:
    """A name that is neither known nor a file."""
    assert "no such file" in str(template_problem("alpaka"))
    assert template_problem("instruction_input") is None


def test_llama_date_is_pinned() -> None:
    """Templates that print a date print the same one every day."""
    tokenizer = byte_level()
    template = JinjaTemplate(
        "chat", "{{ date_string }}: {{ messages[0].content }}", tokenizer, True
    )
    assert template.text(SINGLE.messages) == "26 Jul 2024: Hi?"


def test_rendering_knows_no_tokens() -> None:
    """Spans are characters of the text: the answer as it stands."""
    (rendered,) = render(DOUBLE, choose_template("plain", "messages", byte_level()), "completions")
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Yes.</s>", "So.</s>"]


def test_a_template_that_is_a_pipe_is_refused_unopened(tmp_path: Path) -> None:
    """Reading it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "own.jinja")
    with pytest.raises(DataError, match=r"data\.template=.*own\.jinja is a named pipe"):
        _learned(SINGLE, str(tmp_path / "own.jinja"))
