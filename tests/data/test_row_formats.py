"""Every format's rows become messages; every defect has its reason."""

from __future__ import annotations

from typing import Any

import pytest

from sweeper.config.grammar import read_override
from sweeper.config.settings import FormatName
from sweeper.core.errors import DataError
from sweeper.data import row_formats
from sweeper.data.examples import ChatMessage, DropCounts, RawRow
from sweeper.data.row_formats import FORMATS, detect_format, to_examples

ASKED, ANSWERED = ChatMessage("user", "Hi?"), ChatMessage("assistant", "Yes.")


def _read(
    name: str, *values: Any, columns: dict[str, str] | None = None
) -> tuple[list[Any], DropCounts]:
    drops = DropCounts()
    rows = [RawRow(value, f"f.jsonl:{number}") for number, value in enumerate(values, 1)]
    return to_examples(rows, name, columns or {}, drops), drops


def _turns(role: str, content: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: who, content: text} for who, text in pairs]


SAMPLES: dict[str, tuple[dict[str, Any], tuple[ChatMessage, ...]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        (ChatMessage("user", "Add.", "1, 2"), ChatMessage("assistant", "3")),
    ),
    "prompt_completion": ({"prompt": "Hi?", "completion": "Yes."}, (ASKED, ANSWERED)),
    "question_answer": ({"question": "Hi?", "answer": "Yes."}, (ASKED, ANSWERED)),
    "flan": ({"inputs": "Hi?", "targets": "Yes."}, (ASKED, ANSWERED)),
    "messages": (
        {"messages": _turns("role", "content", ("user", "Hi?"), ("assistant", "Yes."))},
        (ASKED, ANSWERED),
    ),
    "sharegpt": (
        {
            "conversations": _turns(
                "from", "value", ("system", "Be."), ("human", "Hi?"), ("gpt", "Yes.")
            ),
            "source": "x",
        },
        (ChatMessage("system", "Be."), ASKED, ANSWERED),
    ),
    "chat_completion": (
        {
            "prompt": _turns("role", "content", ("user", "Hi?")),
            "completion": _turns("role", "content", ("assistant", "Yes.")),
        },
        (ASKED, ANSWERED),
    ),
    "ultrachat": ({"id": "0", "data": ["Hi?", "Yes."]}, (ASKED, ANSWERED)),
    "text": ({"text": "Once."}, (ChatMessage("assistant", "Once."),)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_format_is_found_by_its_columns_and_read(name: str) -> None:
    """A row of each published layout is recognised and becomes the right messages."""
    values, expected = SAMPLES[name]
    assert detect_format(RawRow(values, "f:1"), {}) == name
    (example,), drops = _read(name, values)
    assert example.messages == expected
    assert example.format == name
    assert drops.total == {}


def test_settings_know_every_format() -> None:
    """data.format may be auto or any key of FORMATS, and nothing else."""
    assert set(FormatName.__args__) == {"auto", *FORMATS}, (
        "FormatName of sweeper/config/data_settings.py and FORMATS of sweeper/data/row_formats.py differ"
    )


def test_metamath_is_question_answer() -> None:
    """query/response is read as question and answer."""
    values = {"type": "GSM", "query": "Hi?", "original_question": "?", "response": "Yes."}
    assert detect_format(RawRow(values, "f:1"), {}) == "question_answer"
    assert _read("question_answer", values)[0][0].messages == (ASKED, ANSWERED)


def test_content_may_be_a_list_of_text_parts() -> None:
    """OpenAI's parts are joined."""
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "Yes."},
    ]
    assert _read("messages", {"messages": turns})[0][0].messages == (ASKED, ANSWERED)


def test_columns_are_mapped_for_detection_and_reading() -> None:
    """data.columns gives the file's names for the format's."""
    columns = {"instruction": "task", "output": "solution"}
    values = {"task": "Hi?", "solution": "Yes."}
    assert detect_format(RawRow(values, "f:1"), columns) == "alpaca"
    (example,), _ = _read("alpaca", values, columns=columns)
    assert example.messages == (ASKED, ANSWERED)
    assert example.row.values == values, "group_by and balance_by see the file's own columns"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "x"}, "does not read such a column"),
        ({"output": "x"}, "no row has this column"),
    ],
)
def test_wrong_column_mapping_is_an_error(columns: dict[str, str], message: str) -> None:
    """A mapping that can do nothing is refused, and says what there is."""
    with pytest.raises(DataError, match=message):
        _read("alpaca", {"instruction": "a", "output": "b"}, columns=columns)


def test_unknown_and_preference_columns_are_errors() -> None:
    """No format: the message lists columns; preference data is named for what it is."""
    with pytest.raises(DataError, match=r"columns a, b .*alpaca: instruction\+output"):
        detect_format(RawRow({"a": 1, "b": 2}, "f:1"), {})
    with pytest.raises(DataError, match="preference data"):
        detect_format(RawRow({"prompt": "p", "chosen": [], "rejected": []}, "f:1"), {})


def _messages(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


DEFECTS: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "a"}, "no output"),
    ("alpaca", {"instruction": "a", "output": None}, "no output"),
    ("alpaca", {"instruction": "a", "output": " \n"}, "output is empty"),
    ("alpaca", {"instruction": "", "output": "b"}, "instruction is empty"),
    ("alpaca", {"instruction": "a", "output": {"x": 1}}, "output is a dict, not text"),
    ("alpaca", {"instruction": "a", "input": {"x": 1}, "output": "b"}, "input is a dict, not text"),
    ("question_answer", {"question": [5], "answer": "b"}, "question is a list, not text"),
    ("question_answer", {"question": "a", "answers": {"text": []}}, "answers holds no text"),
    ("text", {"text": "  "}, "text is empty"),
    ("messages", {"messages": "hi"}, "messages is a str, not a list of turns"),
    ("messages", {"messages": None}, "no messages"),
    ("messages", {"messages": []}, "no assistant turn"),
    ("messages", {"messages": ["hi", {}]}, "a turn is a str, not an object"),
    ("messages", _messages(("user", "a")), "no assistant turn"),
    ("messages", _messages(("assistant", "a")), "roles out of order: assistant after the start"),
    (
        "messages",
        _messages(("user", "a"), ("system", "b"), ("assistant", "c")),
        "roles out of order: system after user",
    ),
    ("messages", _messages(("user", "a"), ("assistant", " ")), "an empty assistant turn"),
    ("messages", _messages(("user", "a"), ("assistant", None)), "an empty assistant turn"),
    ("messages", _messages(("user", ""), ("assistant", "b")), "an empty user turn"),
    ("messages", _messages(("narrator", "a"), ("assistant", "b")), "unknown role 'narrator'"),
    (
        "messages",
        _messages(("user", 3), ("assistant", "b")),
        "the content of a turn is a int, not text",
    ),
    (
        "messages",
        _messages(("user", [{"type": "image"}]), ("assistant", "b")),
        "a part of the user turn is image, not text",
    ),
    (
        "messages",
        _messages(("user", "a"), ("tool", "b"), ("assistant", "c")),
        "roles out of order: tool after user",
    ),
    ("ultrachat", {"data": ["a", 3]}, "a turn is a str, not an object"),
]


@pytest.mark.parametrize(("name", "values", "reason"), DEFECTS)
def test_defective_row_is_counted_with_its_reason(
    name: str, values: dict[str, Any], reason: str
) -> None:
    """A row that is no example is left out, with reason, file and line; its neighbours stay."""
    examples, drops = _read(name, values, SAMPLES[name][0])
    assert len(examples) == 1
    assert drops.counts["format"] == {reason: 1}
    assert drops.places["format", reason] == ["f.jsonl:1"]


def test_what_no_loss_is_computed_on_is_left_out() -> None:
    """An empty system turn and a last question without an answer do not cost the conversation."""
    values = _messages(("system", ""), ("user", "Hi?"), ("assistant", "Yes."), ("user", "More?"))
    (example,), drops = _read("messages", values)
    assert example.messages == (ASKED, ANSWERED)
    assert drops.total == {}


def test_only_the_answer_that_is_read_decides_about_turns() -> None:
    """A whole response of a service beside a prompt and its completion makes no conversation of them."""
    values = {"prompt": "Hi?", "completion": "Yes.", "response": {"id": "x", "choices": [{}]}}
    assert detect_format(RawRow(values, "f:1"), {}) == "prompt_completion"
    (example,), drops = _read("prompt_completion", values)
    assert example.messages == (ASKED, ANSWERED)
    assert drops.unread == {"response": 1}


def test_nan_is_no_value() -> None:
    """A table of numbers has NaN where an optional column has no value, and the row is used."""
    values = {"question": "Hi?", "answer": "Yes.", "context": float("nan"), "label": float("nan")}
    (example,), drops = _read("question_answer", values)
    assert example.messages == (ASKED, ANSWERED)
    assert not drops.unread


@pytest.mark.parametrize("key", ["loss_mask", "a key", "größe"])
def test_the_hint_about_unread_columns_is_an_override(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra reads it, whatever is in the names, and the rows are used with it."""
    monkeypatch.setattr(row_formats, "MEANINGFUL_KEYS", (key,))
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes.", key: "x"}]
    row = RawRow({"messages": turns}, "f:1")
    with pytest.raises(DataError) as refusal:
        to_examples([row], "messages", {}, DropCounts())
    hint = str(refusal.value).split("use '")[-1].removesuffix("'.")
    override = read_override(hint)
    assert override is not None
    ignored = override.value()
    assert ignored == [f"messages[].{key}"]
    assert len(to_examples([row], "messages", {}, DropCounts(), ignored)) == 1


def _node(identity: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"message_id": identity, "parent_id": parent, "role": role, "text": text, **more}


def test_oasst_rows_become_the_best_ranked_path() -> None:
    """Of a tree in rows of any order: rank 0 over rank 1, a reply that goes on over one that ends."""
    rows = [
        _node("b1", "b", "prompter", "Thanks.", rank=None),
        _node("b2", "b", "prompter", "Why?", rank=None),
        _node("a", "root", "assistant", "Worse.", rank=1),
        _node("root", None, "prompter", "Hi?", rank=None),
        _node("b", "root", "assistant", "Yes.", rank=0),
        _node("c", "b2", "assistant", "Because.", rank=0),
        _node("orphan", "gone", "assistant", "?", rank=0),
        _node("d", "root", "assistant", "?", rank=0, deleted=True),
    ]
    assert detect_format(RawRow(rows[0], "f:1"), {}) == "oasst"
    (example,), drops = _read("oasst", *rows)
    assert [turn.content for turn in example.messages] == ["Hi?", "Yes.", "Why?", "Because."]
    assert drops.counts["format"] == {"its tree has no root": 1, "deleted": 1}
    assert drops.counts["path"] == {"a better-ranked reply was taken": 2}


def test_oasst_roots_may_lack_their_parent() -> None:
    """Files of JSON lines without nulls have no parent_id at the root of a tree."""
    rows = [
        _node("a", "root", "assistant", "Yes.", rank=0),
        {key: value for key, value in _node("root", None, "prompter", "Hi?").items() if value},
    ]
    assert detect_format(RawRow(rows[1], "f:1"), {}) == "oasst", "it may be the file's first row"
    (example,), drops = _read("oasst", *rows)
    assert example.messages == (ASKED, ANSWERED)
    assert drops.total == {}


def test_oasst_nested_trees_are_read_too() -> None:
    """A tree in one row, as the ready-for-export files hold it."""
    tree = {
        "message_tree_id": "t",
        "prompt": {
            "role": "prompter",
            "text": "Hi?",
            "replies": [
                {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
                {"role": "assistant", "text": "Yes.", "rank": 0, "replies": []},
            ],
        },
    }
    assert detect_format(RawRow(tree, "f:1"), {}) == "oasst"
    (example,), drops = _read("oasst", tree, {"message_tree_id": "u", "prompt": 3})
    assert example.messages == (ASKED, ANSWERED)
    assert drops.counts["format"] == {"a message of the tree is a int, not an object": 1}


def test_oasst_cycle_is_counted() -> None:
    """Messages that are each other's parents end in the drops, not in a loop."""
    rows = [_node("a", "b", "prompter", "x"), _node("b", "a", "assistant", "y")]
    examples, drops = _read("oasst", *rows)
    assert examples == []
    assert drops.total == {"its tree has no root": 2}
