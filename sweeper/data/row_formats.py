"""Format: rows of known columns into examples, whatever file they came from.

A format is recognised by its columns. Knows nothing of templates and tokens. A row that is no example
is counted with its reason, never repaired; what is left out without loss is said where it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sweeper.core.errors import DataError
from sweeper.data.examples import ChatMessage, DropCounts, Example, RawRow, Role

STAGE = "format"
PATH_STAGE = "path"
"""OASST messages beside the best-ranked path: left out by design, not defective."""

Values = Mapping[str, Any]
Record = tuple[Values, RawRow]
"""A row's values under the format's column names, and the row itself."""
Examples = Callable[[Sequence[Record], DropCounts], Iterable[Example]]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "ipython"})


class UnusableRow(Exception):
    """Why one row is no example: the ledger's reason."""


@dataclass(frozen=True)
class DataFormat:
    """A data format: the columns it is known by, and how records become examples.

    `known_by` holds alternatives; `conversational` ones are printed with the model's chat template.
    """

    known_by: tuple[tuple[str, ...], ...]
    examples: Examples
    optional: tuple[str, ...] = ()
    conversational: bool = False

    @property
    def columns(self) -> set[str]:
        """Every column the format reads."""
        return {*self.optional, *(column for columns in self.known_by for column in columns)}


def detect_format(row: RawRow, columns: Mapping[str, str]) -> str:
    """The name of the format whose columns a row has (`columns`: format's name -> file's name).

    Raises:
        DataError: no format, listing the columns found and those of every format.
    """
    present = {*row.values, *(ours for ours, theirs in columns.items() if theirs in row.values)}
    for name, kind in FORMATS.items():
        if any(present.issuperset(required) for required in kind.known_by):
            return name
    if present >= {"chosen", "rejected"}:
        raise DataError(
            f"{row.where}: chosen/rejected is preference data, which needs another trainer (DPO); to "
            "fine-tune on the chosen answers give data.columns={messages: chosen}"
        )
    known = "; ".join(
        f"{name}: {' or '.join('+'.join(required) for required in kind.known_by)}"
        for name, kind in FORMATS.items()
    )
    raise DataError(
        f"{row.where}: no known format has the columns {', '.join(row.values)} (known: {known}); "
        "map yours with data.columns"
    )


def to_examples(
    rows: Sequence[RawRow], format_name: str, columns: Mapping[str, str], ledger: DropCounts
) -> list[Example]:
    """Every usable row as an example; the others go into the ledger with the reason.

    Args:
        rows: as they were read.
        format_name: a key of FORMATS.
        columns: the format's column -> the column of the rows, where they differ.
        ledger: where unusable rows are counted.

    Raises:
        DataError: `columns` names a column that the format does not read or that no row has.
    """
    kind = FORMATS[format_name]
    _require_columns(rows, format_name, columns)
    records = [
        ({**row.values, **{ours: row.values.get(column) for ours, column in columns.items()}}, row)
        for row in rows
    ]
    made = kind.examples(records, ledger)
    return [Example(example.messages, example.row, format_name) for example in made]


def _require_columns(rows: Sequence[RawRow], format_name: str, columns: Mapping[str, str]) -> None:
    valid = FORMATS[format_name].columns
    for ours, theirs in columns.items():
        if ours not in valid:
            raise DataError(
                f"data.columns.{ours}: the format {format_name} reads no such column; "
                f"it reads {', '.join(sorted(valid))}"
            )
        if rows and not any(theirs in row.values for row in rows):
            raise DataError(
                f"data.columns.{ours}={theirs}: no row has that column; {rows[0].where} has "
                f"{', '.join(rows[0].values)}"
            )


def _row_by_row(
    messages: Callable[[Values], tuple[ChatMessage, ...]],
    records: Sequence[Record],
    ledger: DropCounts,
) -> Iterator[Example]:
    for values, row in records:
        try:
            yield Example(messages(values), row)
        except UnusableRow as reason:
            ledger.drop(STAGE, str(reason), row.where)


# One question, one answer


def _alpaca(values: Values) -> tuple[ChatMessage, ...]:
    given = _text(values, "input") if values.get("input") is not None else ""
    return (ChatMessage("user", _said(values, "instruction"), given), _answer(values, "output"))


def _prompt_completion(values: Values) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", _text(values, "prompt")), _answer(values, "completion"))


def _question_answer(values: Values) -> tuple[ChatMessage, ...]:
    asked, answered = ("query", "response") if "query" in values else ("question", "answer")
    return (ChatMessage("user", _said(values, asked)), _answer(values, answered))


def _flan(values: Values) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", _said(values, "inputs")), _answer(values, "targets"))


def _plain_text(values: Values) -> tuple[ChatMessage, ...]:
    return (_answer(values, "text"),)


def _text(values: Values, column: str) -> str:
    value = values.get(column)
    if value is None:
        raise UnusableRow(f"no {column}")
    if not isinstance(value, str):
        raise UnusableRow(f"{column} is a {type(value).__name__}, not text")
    return value


def _said(values: Values, column: str) -> str:
    text = _text(values, column)
    if not text.strip():
        raise UnusableRow(f"{column} is empty")
    return text


def _answer(values: Values, column: str) -> ChatMessage:
    return ChatMessage("assistant", _said(values, column))


# Conversations


def _conversation(column: str, values: Values) -> tuple[ChatMessage, ...]:
    """OpenAI's role/content and ShareGPT's from/value, under either column."""
    turns = [_turn(item) for item in _list(values, column)]
    if isinstance(values.get("system"), str):
        turns = [ChatMessage("system", values["system"]), *turns]
    return _checked(turns)


def _alternating(values: Values) -> tuple[ChatMessage, ...]:
    """UltraChat's first release: texts, the user's and the assistant's in turn."""
    turns = _list(values, "data")
    if not all(isinstance(turn, str) for turn in turns):
        raise UnusableRow("a turn of data is not text")
    roles: tuple[Role, Role] = ("user", "assistant")
    return _checked([ChatMessage(roles[index % 2], turn) for index, turn in enumerate(turns)])


def _list(values: Values, column: str) -> list[Any]:
    value = values.get(column)
    if value is None:
        raise UnusableRow(f"no {column}")
    if not isinstance(value, list):
        raise UnusableRow(f"{column} is a {type(value).__name__}, not a list of turns")
    return value


def _turn(item: Any) -> ChatMessage:
    if not isinstance(item, Mapping):
        raise UnusableRow(f"a turn is a {type(item).__name__}, not an object")
    role = item.get("role", item.get("from"))
    if role in TOOL_ROLES or item.get("tool_calls") or item.get("function_call"):
        raise UnusableRow("a tool turn; conversations with tools are not supported")
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableRow(f"unknown role {role!r}")
    return ChatMessage(ROLES[role], _content(item.get("content", item.get("value")), ROLES[role]))


def _content(value: Any, role: Role) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UnusableRow(f"the content of a turn is a {type(value).__name__}, not text")
    return "".join(_part(part, role) for part in value)


def _part(part: Any, role: Role) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise UnusableRow(f"a part of the {role} turn is {kind}, not text")
    return text


def _checked(turns: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """A conversation: an optional system turn, then user and assistant in turn, ending with an answer.

    An empty system turn says nothing and is left out; so are turns after the last answer, which no
    loss is ever computed on.
    """
    kept = list(turns)
    if kept and kept[0].role == "system" and not kept[0].content.strip():
        kept = kept[1:]
    while kept and kept[-1].role != "assistant":
        kept = kept[:-1]
    if not kept:
        raise UnusableRow("no assistant turn")
    before = "the start"
    for turn in kept:
        if turn.role not in FOLLOWS[before]:
            raise UnusableRow(f"roles out of order: {turn.role} after {before}")
        if not turn.content.strip():
            raise UnusableRow(f"an empty {turn.role} turn")
        before = turn.role
    return tuple(kept)


FOLLOWS: dict[str, tuple[Role, ...]] = {
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
}


# OASST: trees of messages


@dataclass
class _Node:
    """One message of a tree and its replies."""

    values: Values
    row: RawRow
    replies: list[_Node] = field(default_factory=list)


def _oasst(records: Sequence[Record], ledger: DropCounts) -> Iterator[Example]:
    """The best-ranked path of every tree, whether its messages are rows or nested in one row."""
    for root in _trees(records, ledger):
        try:
            yield Example(_checked([_turn(_renamed(node)) for node in _best_path(root)]), root.row)
        except UnusableRow as reason:
            ledger.drop(STAGE, str(reason), root.row.where)


def _trees(records: Sequence[Record], ledger: DropCounts) -> list[_Node]:
    if not any("prompt" in values for values, _ in records):
        return _linked(records, ledger)
    roots = []
    for values, row in records:
        try:
            roots.append(_nested(values.get("prompt"), row))
        except UnusableRow as reason:
            ledger.drop(STAGE, str(reason), row.where)
    return roots


def _nested(values: Any, row: RawRow) -> _Node:
    if not isinstance(values, Mapping):
        raise UnusableRow(f"a message of the tree is a {type(values).__name__}, not an object")
    replies = values.get("replies") or []
    if not isinstance(replies, list):
        raise UnusableRow(f"replies is a {type(replies).__name__}, not a list")
    return _Node(values, row, [_nested(reply, row) for reply in replies])


def _linked(records: Sequence[Record], ledger: DropCounts) -> list[_Node]:
    """Trees of rows that name their parent."""
    nodes: dict[str, _Node] = {}
    for values, row in records:
        if reason := _node_defect(values, nodes):
            ledger.drop(STAGE, reason, row.where)
        else:
            nodes[values["message_id"]] = _Node(values, row)
    for node in nodes.values():
        if parent := nodes.get(str(node.values.get("parent_id"))):
            parent.replies.append(node)
    roots = [node for node in nodes.values() if node.values.get("parent_id") is None]
    _count_left_out(nodes.values(), roots, ledger)
    return roots


def _node_defect(values: Values, nodes: Mapping[str, _Node]) -> str | None:
    identity = values.get("message_id")
    if values.get("deleted"):
        return "deleted"
    if not isinstance(identity, str):
        return "no message_id"
    return "message_id seen before" if identity in nodes else None


def _count_left_out(nodes: Iterable[_Node], roots: Sequence[_Node], ledger: DropCounts) -> None:
    reached = {id(node) for root in roots for node in _all_nodes(root)}
    taken = {id(node) for root in roots for node in _best_path(root)}
    for node in nodes:
        if id(node) not in reached:
            ledger.drop(STAGE, "its tree has no root", node.row.where)
        elif id(node) not in taken:
            ledger.drop(PATH_STAGE, "a better-ranked reply was taken", node.row.where)


def _all_nodes(root: _Node) -> Iterator[_Node]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.replies


def _best_path(root: _Node) -> list[_Node]:
    """From the root always to the best reply: rank 0 is best, unranked last, then one that goes on."""
    path = [root]
    while replies := path[-1].replies:
        path.append(min(replies, key=_rank))
    return path


def _rank(node: _Node) -> tuple[float, bool]:
    rank = node.values.get("rank")
    return (float(rank) if isinstance(rank, int | float) else math.inf, not node.replies)


def _renamed(node: _Node) -> dict[str, Any]:
    return {"role": node.values.get("role"), "content": node.values.get("text")}


def _of_rows(messages: Callable[[Values], tuple[ChatMessage, ...]]) -> Examples:
    return partial(_row_by_row, messages)


FORMATS: dict[str, DataFormat] = {
    # the first that fits is taken: conversations before the columns that often stand beside them
    "messages": DataFormat(
        (("messages",),), _of_rows(partial(_conversation, "messages")), ("system",), True
    ),
    "sharegpt": DataFormat(
        (("conversations",),), _of_rows(partial(_conversation, "conversations")), ("system",), True
    ),
    "oasst": DataFormat(
        (("message_id", "parent_id", "role", "text"), ("message_tree_id", "prompt")),
        _oasst,
        ("rank", "deleted"),
        True,
    ),
    "alpaca": DataFormat((("instruction", "output"),), _of_rows(_alpaca), ("input",)),
    "prompt_completion": DataFormat((("prompt", "completion"),), _of_rows(_prompt_completion)),
    "question_answer": DataFormat(
        (("question", "answer"), ("query", "response")), _of_rows(_question_answer)
    ),
    "flan": DataFormat((("inputs", "targets"),), _of_rows(_flan)),
    "ultrachat": DataFormat((("data",),), _of_rows(_alternating), (), True),
    "text": DataFormat((("text",),), _of_rows(_plain_text)),
}
"""By name, as `data.format` says it. CodeAlpaca is alpaca; MetaMath is question_answer."""
