"""Convert rows with known columns into examples.

A format is recognised by its columns, independently of the kind of file. A row that cannot be converted
is dropped and counted with its reason, never repaired. Does not know templates or tokens.
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
"""Stage under which OASST messages outside the best-ranked path are counted: they are not defective."""

Values = Mapping[str, Any]
Record = tuple[Values, RawRow]
"""A row's values under the format's column names, and the row."""
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
    """Reason why a row cannot become an example, as counted in `DropCounts`."""


@dataclass(frozen=True)
class DataFormat:
    """A data format: the columns it is recognised by, and the function that makes examples.

    Attributes:
        known_by: Alternative sets of columns, each sufficient to recognise the format.
        examples: Function that converts records into examples and counts unusable ones.
        optional: Columns that are read if present.
        conversational: True if data.template=auto renders the format with the model's chat template.
    """

    known_by: tuple[tuple[str, ...], ...]
    examples: Examples
    optional: tuple[str, ...] = ()
    conversational: bool = False

    @property
    def columns(self) -> set[str]:
        """Every column that the format reads."""
        return {*self.optional, *(column for columns in self.known_by for column in columns)}


def detect_format(row: RawRow, columns: Mapping[str, str]) -> str:
    """Return the name of the format whose columns a row has.

    Args:
        row: Row to recognise.
        columns: Column of a format -> column of the row, where they differ (data.columns).

    Raises:
        DataError: No format has these columns. The message lists them and those of every format.
    """
    present = {*row.values, *(ours for ours, theirs in columns.items() if theirs in row.values)}
    for name, kind in FORMATS.items():
        if any(present.issuperset(required) for required in kind.known_by):
            return name
    # Preference data is common, and "no known format" would not tell the user why it is refused.
    if present >= {"chosen", "rejected"}:
        raise DataError(
            f"{row.where}: chosen/rejected is preference data, which needs another trainer (DPO). To "
            "fine-tune on the chosen answers use data.columns={messages: chosen}"
        )
    known = "; ".join(
        f"{name}: {' or '.join('+'.join(required) for required in kind.known_by)}"
        for name, kind in FORMATS.items()
    )
    raise DataError(
        f"{row.where}: no known format has the columns {', '.join(row.values)} (known formats: "
        f"{known}). Map your columns with data.columns."
    )


def to_examples(
    rows: Sequence[RawRow], format_name: str, columns: Mapping[str, str], drops: DropCounts
) -> list[Example]:
    """Return every usable row as an example, and count the others in `drops`.

    Args:
        rows: Rows as they were read.
        format_name: Key of FORMATS.
        columns: Column of the format -> column of the rows, where they differ.
        drops: Counter of unusable rows.

    Raises:
        DataError: `columns` names a column that the format does not read or that no row has.
    """
    kind = FORMATS[format_name]
    _require_columns(rows, format_name, columns)
    records = [
        ({**row.values, **{ours: row.values.get(column) for ours, column in columns.items()}}, row)
        for row in rows
    ]
    made = kind.examples(records, drops)
    return [Example(example.messages, example.row, format_name) for example in made]


def _require_columns(rows: Sequence[RawRow], format_name: str, columns: Mapping[str, str]) -> None:
    valid = FORMATS[format_name].columns
    # A mapping without effect is refused, because its author expects one.
    for ours, theirs in columns.items():
        if ours not in valid:
            raise DataError(
                f"data.columns.{ours}: the format {format_name} does not read such a column. "
                f"It reads {', '.join(sorted(valid))}."
            )
        if rows and not any(theirs in row.values for row in rows):
            raise DataError(
                f"data.columns.{ours}={theirs}: no row has this column. The columns of "
                f"{rows[0].where} are {', '.join(rows[0].values)}."
            )


def _row_by_row(
    messages: Callable[[Values], tuple[ChatMessage, ...]],
    records: Sequence[Record],
    drops: DropCounts,
) -> Iterator[Example]:
    for values, row in records:
        try:
            yield Example(messages(values), row)
        except UnusableRow as reason:
            drops.drop(STAGE, str(reason), row.where)


# Formats with one question and one answer


def _alpaca(values: Values) -> tuple[ChatMessage, ...]:
    extra = _text(values, "input") if values.get("input") is not None else ""
    return (
        ChatMessage("user", _non_empty(values, "instruction"), extra),
        _answer(values, "output"),
    )


def _prompt_completion(values: Values) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", _text(values, "prompt")), _answer(values, "completion"))


def _question_answer(values: Values) -> tuple[ChatMessage, ...]:
    question, answer = ("query", "response") if "query" in values else ("question", "answer")
    return (ChatMessage("user", _non_empty(values, question)), _answer(values, answer))


def _flan(values: Values) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", _non_empty(values, "inputs")), _answer(values, "targets"))


def _plain_text(values: Values) -> tuple[ChatMessage, ...]:
    return (_answer(values, "text"),)


def _text(values: Values, column: str) -> str:
    value = values.get(column)
    if value is None:
        raise UnusableRow(f"no {column}")
    if not isinstance(value, str):
        raise UnusableRow(f"{column} is a {type(value).__name__}, not text")
    return value


def _non_empty(values: Values, column: str) -> str:
    text = _text(values, column)
    if not text.strip():
        raise UnusableRow(f"{column} is empty")
    return text


def _answer(values: Values, column: str) -> ChatMessage:
    return ChatMessage("assistant", _non_empty(values, column))


# Conversations


def _conversation(column: str, values: Values) -> tuple[ChatMessage, ...]:
    """Convert turns of role/content (OpenAI) or from/value (ShareGPT) under either column."""
    turns = [_turn(item) for item in _list(values, column)]
    # Some data sets keep the system prompt in a column of its own.
    if isinstance(values.get("system"), str):
        turns = [ChatMessage("system", values["system"]), *turns]
    return _checked(turns)


def _alternating(values: Values) -> tuple[ChatMessage, ...]:
    """Convert UltraChat's first release: texts of user and assistant in alternation."""
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
        raise UnusableRow("a tool turn (conversations with tools are not supported)")
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
    """Return a valid conversation: an optional system turn, then alternating user and assistant turns.

    Raises:
        UnusableRow: A turn is empty, the roles do not alternate, or there is no assistant turn.
    """
    # An empty system turn and turns after the last answer are left out without being counted, because
    # no loss would be computed on them.
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


# OASST: trees of messages, from which the best-ranked conversation is taken


@dataclass
class _Node:
    """One message of a conversation tree and its replies."""

    values: Values
    row: RawRow
    replies: list[_Node] = field(default_factory=list)


def _oasst(records: Sequence[Record], drops: DropCounts) -> Iterator[Example]:
    """Yield the best-ranked path of every tree. Messages may be rows, or nested in one row."""
    for root in _trees(records, drops):
        try:
            turns = [
                _turn({"role": node.values.get("role"), "content": node.values.get("text")})
                for node in _best_path(root)
            ]
            yield Example(_checked(turns), root.row)
        except UnusableRow as reason:
            drops.drop(STAGE, str(reason), root.row.where)


def _trees(records: Sequence[Record], drops: DropCounts) -> list[_Node]:
    if not any("prompt" in values for values, _ in records):
        return _linked(records, drops)
    roots = []
    for values, row in records:
        try:
            roots.append(_nested(values.get("prompt"), row))
        except UnusableRow as reason:
            drops.drop(STAGE, str(reason), row.where)
    return roots


def _nested(values: Any, row: RawRow) -> _Node:
    if not isinstance(values, Mapping):
        raise UnusableRow(f"a message of the tree is a {type(values).__name__}, not an object")
    replies = values.get("replies") or []
    if not isinstance(replies, list):
        raise UnusableRow(f"replies is a {type(replies).__name__}, not a list")
    return _Node(values, row, [_nested(reply, row) for reply in replies])


def _linked(records: Sequence[Record], drops: DropCounts) -> list[_Node]:
    """Return the roots of the trees, given one row per message with its parent's id."""
    nodes: dict[str, _Node] = {}
    for values, row in records:
        if reason := _node_defect(values, nodes):
            drops.drop(STAGE, reason, row.where)
        else:
            nodes[values["message_id"]] = _Node(values, row)
    for node in nodes.values():
        if parent := nodes.get(str(node.values.get("parent_id"))):
            parent.replies.append(node)
    roots = [node for node in nodes.values() if node.values.get("parent_id") is None]
    _count_unused(nodes.values(), roots, drops)
    return roots


def _node_defect(values: Values, nodes: Mapping[str, _Node]) -> str | None:
    identity = values.get("message_id")
    if values.get("deleted"):
        return "deleted"
    if not isinstance(identity, str):
        return "no message_id"
    return "message_id seen before" if identity in nodes else None


def _count_unused(nodes: Iterable[_Node], roots: Sequence[_Node], drops: DropCounts) -> None:
    reached = {id(node) for root in roots for node in _all_nodes(root)}
    taken = {id(node) for root in roots for node in _best_path(root)}
    for node in nodes:
        if id(node) not in reached:
            drops.drop(STAGE, "its tree has no root", node.row.where)
        elif id(node) not in taken:
            drops.drop(PATH_STAGE, "a better-ranked reply was taken", node.row.where)


def _all_nodes(root: _Node) -> Iterator[_Node]:
    # A loop instead of recursion: linked rows may form a chain of any length.
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.replies


def _best_path(root: _Node) -> list[_Node]:
    """Return the path from the root to a leaf that follows the best reply at each message."""
    path = [root]
    while replies := path[-1].replies:
        path.append(min(replies, key=_rank))
    return path


def _rank(node: _Node) -> tuple[float, bool]:
    # Rank 0 is the best reply and unranked replies come last. Of equal ranks a reply that was answered
    # wins.
    rank = node.values.get("rank")
    return (float(rank) if isinstance(rank, int | float) else math.inf, not node.replies)


def _of_rows(messages: Callable[[Values], tuple[ChatMessage, ...]]) -> Examples:
    return partial(_row_by_row, messages)


FORMATS: dict[str, DataFormat] = {
    # detect_format takes the first match. Conversations come first because such rows often have
    # prompt, question or text columns as well.
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
"""Formats by the name used in data.format. CodeAlpaca is alpaca, and MetaMath is question_answer."""
