"""Rows as people have them: each becomes the right messages, or is refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sweeper.core.errors import DataError
from sweeper.data.data_card import show
from sweeper.data.encode import encode_evaluation, encode_prompts, encode_train
from sweeper.data.examples import ChatMessage, DropCounts, Example, RawRow
from sweeper.data.row_formats import FORMATS, MEANINGFUL, METADATA, detect_format, to_examples
from sweeper.data.splits import DataSplits, load_splits
from tests.data.chat import CHATML, GEMMA, MISTRAL, QWEN3, byte_level, talk
from tests.data.samples import make_data, write_rows
from tests.data.test_row_formats import SAMPLES

TOOLS = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.reasoning_content %}{{ '[' + message.reasoning_content + ']' }}{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '(' + call.function.name + ' ' + ARGUMENTS + ')' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AS_OBJECT = TOOLS.replace("ARGUMENTS", "call.function.arguments | tojson")
AS_TEXT = TOOLS.replace("ARGUMENTS", "call.function.arguments")
NO_NULL = AS_OBJECT.replace("message['content'] or ''", "message['content'] + ''")
THINKS = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
).replace(
    "+ '\n' + message['content']",
    "+ '\n' + ('<think>\n\n</think>\n\n' if message.role == 'assistant' else '') + message['content']",
)


def _read(values: Mapping[str, Any], **options: Any) -> tuple[Example, DropCounts]:
    row, drops = RawRow(values, "f.jsonl:1"), DropCounts()
    columns = options.pop("columns", {})
    (example,) = to_examples([row], detect_format(row, columns), columns, drops, **options)
    return example, drops


def _turns(values: Mapping[str, Any], **options: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in _read(values, **options)[0].messages]


def _load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> DataSplits:
    return load_splits(make_data(train=write_rows(path / "rows.jsonl", rows), **settings))


def _shown(example: Example, template: str = CHATML, **settings: Any) -> list[str]:
    tokenizer = byte_level(chat_template=template)
    encoded = encode_train([example], tokenizer, make_data(**settings), None)
    return [show(row, tokenizer) for row in encoded.rows]


def _chat(*turns: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text, **more} for role, text, more in turns]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            [("user", "q"), ("assistant", "a")],
        ),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [3]}},
            [("user", "q"), ("assistant", "a")],
        ),
        ({"prompt": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"input": "q", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"Instruction": "q", "Output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "output": 7}, [("user", "q"), ("assistant", "7")]),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"system": "s", "instruction": "q", "output": "a", "history": [["x", "y"]]},
            [("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, [("user", "q"), ("assistant", "a")]),
        ({"conversations": ["q", "a"]}, [("user", "q"), ("assistant", "a")]),
        (_chat(("User", "q", {}), ("AI", "a", {})), [("user", "q"), ("assistant", "a")]),
        (
            _chat(("user", "q", {}), ("user", "r", {}), ("assistant", "a", {})),
            [("user", "q\n\nr"), ("assistant", "a")],
        ),
        (
            _chat(("assistant", "Hi", {}), ("user", "q", {}), ("assistant", "a", {})),
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_layouts_that_people_have(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    """Each layout is read without a mapping, with all that its columns say."""
    assert _turns(values) == expected


@pytest.mark.parametrize("column", ["context", "input"])
@pytest.mark.parametrize("asked", ["instruction", "question"])
def test_context_is_part_of_the_prompt(asked: str, column: str) -> None:
    """What the question is about is read with it, whatever the format."""
    example, drops = _read({asked: "q", column: "c", "output": "a"})
    assert example.messages[0] == ChatMessage("user", "q", "c")
    assert not drops.unread


@pytest.mark.parametrize("name", sorted(MEANINGFUL))
@pytest.mark.parametrize("format_name", SAMPLES)
def test_a_column_with_meaning_is_read_or_refused(format_name: str, name: str) -> None:
    """Of every format: each such column is in the messages or tools, or refused until it is named."""
    plain, _ = SAMPLES[format_name]
    if name in plain or name in METADATA.get(format_name, ()):
        pytest.skip("the sample has this column itself")
    value: Any = [["x", "y"]] if name == "history" else "zebra"
    value = [{"name": "zebra"}] if name in ("tools", "functions") else value
    row, refusal = RawRow({**plain, name: value}, "f:1"), ""
    try:
        (example,) = to_examples([row], format_name, {}, DropCounts())
    except DataError as error:
        refusal = str(error)
        (example,) = to_examples([row], format_name, {}, DropCounts(), [name])
    read = "zebra" in str((example.messages, example.tools)) or len(example.messages) > 3
    assert read == (refusal == "")
    assert read or f"data.ignore_columns=[{name}]" in refusal


@pytest.mark.parametrize("format_name", SAMPLES)
def test_other_columns_are_counted_as_unread(format_name: str) -> None:
    """A column without known meaning is named with its rows, an empty one is not."""
    row = RawRow({**SAMPLES[format_name][0], "Colour": "red", "nothing": None, "no": []}, "f:1")
    drops = DropCounts()
    to_examples([row, row], format_name, {}, drops)
    assert drops.unread["Colour"] == 2
    assert not {"nothing", "no"} & drops.unread.keys()


def test_other_keys_of_turns_are_counted_as_unread() -> None:
    """A key of a turn that nothing reads is named with its column."""
    _, drops = _read(_chat(("user", "q", {"mood": "sad"}), ("assistant", "a", {"mood": None})))
    assert drops.unread == {"messages[].mood": 1}


def test_unread_columns_used_by_settings_are_not_named(tmp_path: Path) -> None:
    """A column that groups the rows is read."""
    rows = [{"prompt": f"p{n}", "completion": "c", "topic": str(n), "id": n + 1} for n in range(9)]
    assert _load(tmp_path, rows, group_by="topic").unread == {"id": 9}


def test_a_column_with_meaning_may_group_the_rows(tmp_path: Path) -> None:
    """A setting that groups by a document says what the column is for."""
    rows = [{"question": f"q{n}", "answer": "a", "document": str(n)} for n in range(9)]
    with pytest.raises(DataError, match="does not read document"):
        _load(tmp_path, rows)
    assert _load(tmp_path, rows, group_by="document").unread == {}


@pytest.mark.parametrize("more", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
@pytest.mark.parametrize("train_on", ["completions", "everything"])
@pytest.mark.parametrize("template", [CHATML, QWEN3, MISTRAL])
def test_turns_without_weight_carry_no_loss(
    template: str, train_on: str, more: dict[str, Any]
) -> None:
    """The answer that is marked as wrong is context, under every template."""
    values = _chat(
        ("user", "Hi", {}),
        ("assistant", "WRONG", more),
        ("user", "no", {}),
        ("assistant", "ok", {}),
    )
    example, _ = _read(values)
    if train_on == "everything" and template == QWEN3:
        pytest.skip("rewrites earlier turns, which is refused")
    (shown,) = _shown(example, template, train_on=train_on)
    learned = "".join(part.partition("»")[0] for part in shown.split("«")[1:])
    assert "WRONG" in shown
    assert "WRONG" not in learned
    assert "ok" in learned


def test_half_a_weight_and_no_trained_answer_are_reasons() -> None:
    """A weight that cannot be honoured is not rounded."""
    for more, reason in (
        ({"weight": 0.5}, "only 0 and 1"),
        ({"weight": 0}, "no assistant turn carr"),
    ):
        drops = DropCounts()
        row = RawRow(_chat(("user", "q", {}), ("assistant", "a", more)), "f:1")
        assert to_examples([row], "messages", {}, drops) == []
        assert any(reason in found for found in drops.total)


def test_history_carries_loss_by_request_only() -> None:
    """Earlier answers are context, unless data.train_history says otherwise."""
    values = {"instruction": "q", "output": "a", "history": [["x", "y"]]}
    assert [turn.trained for turn in _read(values)[0].messages] == [True, False, True, True]
    assert all(turn.trained for turn in _read(values, train_history=True)[0].messages)


CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"x": 1}'}}
CALLS = {
    "messages": [
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "tools": [{"name": "add", "parameters": {"x": None, "y": {"type": "int", "enum": None}}}],
}


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, NO_NULL])
def test_tools_reach_templates_in_the_form_that_they_take(template: str) -> None:
    """Arguments as object or text, content null or empty: the same text, loss on the assistant only."""
    example, drops = _read(CALLS)
    assert not drops.unread
    (shown,) = _shown(example, template)
    assert '«(add {"x": 1})<|im_end|>»' in shown
    assert "«It is 2.<|im_end|>»" in shown
    assert shown.count("«") == 2
    assert '"parameters": {"y": {"type": "int"}}' in shown.partition("\n")[0]


@pytest.mark.parametrize("tools", [CALLS["tools"], json.dumps(CALLS["tools"])])
def test_a_template_without_tools_refuses_them_until_they_are_ignored(tools: Any) -> None:
    """Functions that a template does not print are a reason, with the setting that does without."""
    values = {**_chat(("user", "q", {}), ("assistant", "a", {})), "tools": tools}
    with pytest.raises(
        DataError, match=r"does not print the tools .*data.ignore_columns=\[tools\]"
    ):
        _shown(_read(values)[0], CHATML)
    assert _shown(_read(values, ignored=["tools"])[0], CHATML)


def test_function_call_turns_of_sharegpt_are_tool_calls() -> None:
    """Roles of their own become a tool call and its result."""
    turns = [("human", "sum"), ("function_call", '{"name": "add", "arguments": {"x": 1}}')]
    turns += [("observation", "2"), ("gpt", "It is 2.")]
    values = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (shown,) = _shown(_read(values)[0], AS_OBJECT)
    assert '«(add {"x": 1})<|im_end|>»' in shown


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template_or_is_counted(key: str) -> None:
    """Where the template prints it, it is trained, and where not, the row is counted."""
    example, drops = _read(_chat(("user", "q", {}), ("assistant", "4", {key: "2+2"})))
    assert not drops.unread
    assert "«[2+2]4<|im_end|>»" in _shown(example, AS_OBJECT)[0]
    tokenizer = byte_level(chat_template=CHATML)
    encoded = encode_train([example], tokenizer, make_data(), None)
    assert encoded.drops.changed == {
        "reasoning_content of a turn not printed by the template chat": 1
    }


def test_template_variables_decide_prompt_and_mask() -> None:
    """An empty think block that the generation prompt supplies carries no loss."""
    example, settings = talk("q", "a"), {"chat_template_kwargs": {"enable_thinking": False}}
    assert _shown(example, THINKS, **settings)[0].endswith("</think>\n\n«a<|im_end|>»\n")
    assert "«<think>" in _shown(example, THINKS)[0]
    tokenizer = byte_level(chat_template=THINKS)
    (prompt,) = encode_prompts([example], tokenizer, make_data(**settings))
    assert prompt.text.endswith("</think>\n\n")
    with pytest.raises(DataError, match="has no variables"):
        encode_train([example], tokenizer, make_data(**settings, template="instruction"), None)


def test_a_text_column_is_one_row_a_record(tmp_path: Path) -> None:
    """Records keep their borders and get an end token each. By request they are a book."""
    rows = [{"text": f"Text {number}."} for number in range(20)]
    splits = _load(tmp_path, rows)
    assert splits.counts == {"validation": 2, "test": 2, "train": 16}
    tokenizer = byte_level()
    encoded = encode_train(splits.examples["train"], tokenizer, make_data(), None)
    assert len(encoded.rows) == 16
    ends = [row["labels"].count(tokenizer.eos_token_id) for row in encoded.rows]
    assert ends == [1] * 16
    assert _load(tmp_path, rows, format="book").formats == ("book",)
    (tmp_path / "book.txt").write_text(" ".join(f"Sentence {n}." for n in range(99)))
    book = load_splits(make_data(train=str(tmp_path / "book.txt"), format="text"))
    assert book.formats == ("book",)


@pytest.mark.parametrize("label", ["label", "sentiment"])
def test_a_label_beside_a_text_is_refused_with_the_mapping(tmp_path: Path, label: str) -> None:
    """The printed mapping trains it, as text of the answer."""
    rows = [{"text": f"Text {number}.", label: number % 3 + 1} for number in range(20)]
    mapping = {"question": "text", "answer": label}
    with pytest.raises(DataError, match=f"data.columns={{question: text, answer: {label}}}"):
        _load(tmp_path, rows)
    splits = _load(tmp_path, rows, columns=mapping)
    assert splits.examples["train"][0].completion in ("1", "2", "3")
    assert splits.unread == {}


PREFERENCES: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "completion: chosen",
        {"completion": "chosen"},
    ),
    (
        {"question": "q", "chosen": "a", "rejected": "b"},
        "answer: chosen",
        {"answer": "chosen"},
    ),
    (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        "answer: chosen",
        {"answer": "chosen"},
    ),
    (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        "output: chosen",
        {"output": "chosen"},
    ),
    ({"chosen": "a", "rejected": "b"}, "text: chosen", {"text": "chosen"}),
    (
        {
            "prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [],
        },
        "messages: chosen",
        {"messages": "chosen"},
    ),
    (
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        "completion: chosen",
        {"completion": "chosen"},
    ),
]


@pytest.mark.parametrize(("values", "hint", "columns"), PREFERENCES)
def test_the_hint_for_preference_data_works_as_printed(
    values: dict[str, Any], hint: str, columns: dict[str, str]
) -> None:
    """The chosen answer is trained with the mapping that the refusal prints."""
    with pytest.raises(DataError, match=f"preference data.*{{{hint}}}"):
        _read(values)
    row, drops = RawRow(values, "f:1"), DropCounts()
    found = detect_format(row, columns)
    (example,) = to_examples([row], found, columns, drops)
    assert example.completion == "a"
    assert "q" not in values.values() or example.messages[-2].content == "q"
    assert example.messages[0].content == values.get("system", example.messages[0].content)


def test_system_turns_are_folded_where_the_template_has_none() -> None:
    """The text of the system turn begins the first question, is counted, and judged alike."""
    tokenizer = byte_level(chat_template=GEMMA)
    examples = [talk("Hi?", "Yes."), talk("Hi?", "Yes.", system="Be terse.")]
    encoded = encode_train(examples, tokenizer, make_data(), None)
    assert "Be terse.\n\nHi?" in show(encoded.rows[1], tokenizer)
    folded = {"system turn folded into the first user turn (template chat)": 1}
    assert encoded.drops.changed == folded
    assert encode_evaluation(examples, tokenizer, make_data(), None, 32).drops.changed == folded
    prompts = encode_prompts(examples, tokenizer, make_data())
    assert "Be terse.\n\nHi?" in prompts[1].text


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|im_end|>\n", "</s>"])
def test_an_end_token_in_the_data_is_not_doubled(ending: str) -> None:
    """The row is that of the answer without it, and counted."""
    assert _shown(talk("Hi?", f"Yes.{ending}")) == _shown(talk("Hi?", "Yes."))
    plain = Example(talk("Hi?", "Yes.</s>").messages, RawRow({}, "f:1"), "prompt_completion")
    assert _shown(plain) == ["Hi?«Yes.</s>»"]


def test_control_tokens_of_users_are_text() -> None:
    """They get the ids of their letters, are counted, and stay tokens where asked or verbatim."""
    tokenizer = byte_level(chat_template=CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    example = talk("What is <|im_end|>?", "It <|im_end|> ends.")
    encoded = encode_train([example], tokenizer, make_data(), None)
    assert encoded.rows[0]["input_ids"].count(end) == 2
    assert show(encoded.rows[0], tokenizer) == (
        "<|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n«It <|im_end|> ends.<|im_end|>»\n"
    )
    assert encoded.drops.changed == {"control tokens in the text, encoded as text": 1}
    (prompt,) = encode_prompts([example], tokenizer, make_data())
    assert prompt.reference == "It <|im_end|> ends."
    assert prompt.input_ids == encoded.rows[0]["input_ids"][: len(prompt.input_ids)]
    kept = encode_train([example], tokenizer, make_data(control_tokens="tokens"), None)
    assert kept.rows[0]["input_ids"].count(end) == 4


def test_a_byte_order_mark_in_a_template_is_dropped(tmp_path: Path) -> None:
    """Editors put it there, and no prompt contains it."""
    path = tmp_path / "mark.jinja"
    path.write_text(CHATML, encoding="utf-8-sig")
    assert _shown(talk("Hi?", "Yes."), template=CHATML) == _shown_with(path)


def _shown_with(path: Path) -> list[str]:
    tokenizer = byte_level()
    encoded = encode_train([talk("Hi?", "Yes.")], tokenizer, make_data(template=str(path)), None)
    return [show(row, tokenizer) for row in encoded.rows]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_recognised(tmp_path: Path, separator: str) -> None:
    """A header without a comma names its own separator, which is told."""
    lines = [["instruction", "output"], *([f"Add {n}, and 1", str(n + 1)] for n in range(9))]
    path = tmp_path / "rows.csv"
    path.write_text("".join(separator.join(line) + "\n" for line in lines))
    splits = load_splits(make_data(train=str(path)))
    assert sum(splits.counts.values()) == 9
    assert splits.changed == {f"columns separated by {separator!r}": 1}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_in_jsonl_is_read(tmp_path: Path, indent: int | None) -> None:
    """The ending does not matter where the content says what it is."""
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Add {n}", "output": str(n)} for n in range(9)]
    path.write_text("\ufeff" + json.dumps(rows, indent=indent))
    assert sum(load_splits(make_data(train=str(path))).counts.values()) == 9


def test_every_format_has_a_sample_here() -> None:
    """The tests over formats and columns cover all that have rows."""
    assert set(SAMPLES) >= set(FORMATS) - {"oasst", "book"}


def test_a_folder_of_texts_and_markdown_is_one_source(tmp_path: Path) -> None:
    """Both kinds are read, and a README.md that is left out is told."""
    for number in range(3):
        for kind in ("txt", "md"):
            text = " ".join(f"Sentence {n} of {number} {kind}." for n in range(99))
            (tmp_path / f"part_{number}.{kind}").write_text(text)
    (tmp_path / "README.md").write_text("# About\n\nNot a text.")
    splits = load_splits(make_data(train=str(tmp_path)))
    texts = "".join(each.completion for found in splits.examples.values() for each in found)
    assert all(f"of {number} {kind}" in texts for number in range(3) for kind in ("txt", "md"))
    assert splits.changed == {"README.md describes the folder and is not read as text": 1}


@pytest.mark.parametrize("dev", ["dev", "validation", "val"])
def test_a_folders_own_files_are_its_splits(tmp_path: Path, dev: str) -> None:
    """Validation and test files beside the training file are used, which is told."""
    for name, start, count in (("train", 0, 20), (dev, 100, 3), ("test", 200, 4)):
        rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(start, start + count)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    splits = load_splits(make_data(train=str(tmp_path)))
    assert splits.counts == {"train": 20, "validation": 3, "test": 4}
    assert splits.changed == {
        "validation rows from the folder's own validation files": 3,
        "test rows from the folder's own test files": 4,
    }


def test_the_same_prompt_with_another_answer_is_a_near_leak(tmp_path: Path) -> None:
    """The rows stay, and the ones in train are counted."""
    train = write_rows(
        tmp_path / "t.jsonl", [{"prompt": "q", "completion": f"a{n}"} for n in range(9)]
    )
    judged = write_rows(tmp_path / "v.jsonl", [{"prompt": "Q", "completion": "other"}])
    splits = load_splits(make_data(train=train, validation=judged, test_ratio=0.0))
    leak = "train rows with the prompt of a validation row and another answer (near leak)"
    assert splits.changed == {leak: 9}
    assert splits.counts["train"] == 9
