"""Convert rows with known columns into examples.

A format is recognised by its columns, independently of the kind of file. A row that cannot be converted
is dropped and counted with its reason, never repaired. Columns that no format reads are counted, and
refused if they are known to carry meaning. Does not know templates or tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard

from sweeper.core.errors import DataError
from sweeper.data.examples import ChatMessage, DropCounts, Example, RawRow, Role
from sweeper.data.turns import (
    REASONING,
    RowValues,
    UnusableRow,
    conversation,
    has_value,
    ordered,
    tools_of,
    turn,
    turn_list,
)

STAGE = "format"
PATH_STAGE = "path"
"""Stage under which OASST messages outside the best-ranked path are counted: they are not defective."""
BOOK = "book"
"""Format of texts that are joined and cut into blocks: .txt and .md files, or rows by request."""
TEXT_FORMATS = ("text", BOOK)

Values = Mapping[str, Any]
Record = tuple[RowValues, RawRow]
"""A row's values under the format's column names, and the row."""
Messages = Callable[[RowValues], tuple[ChatMessage, ...]]
Examples = Callable[[Sequence[Record], DropCounts], Iterable[Example]]

SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
ANSWERS = ("output", "answer", "response", "completion", "answers")
COMPLETIONS = ("completion", "response", "output", "answer")
"""Names of the answer to a prompt that is a list of turns."""
QUESTIONS = ("question", "query", "prompt", "input", "inputs")
AROUND = (*SYSTEM, "history", "context", "input", *REASONING)
"""Columns that every format of one question and its answer reads if present."""

PREFERENCES = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_response", "rejected_response"),
)
"""Names of the better and the worse answer in preference data."""
ANSWER_TO = {"instruction": "output", **dict.fromkeys(("question", "query"), "answer")}
"""Names under which the answer to a question in a column of this name is read with all around it."""
PASSAGES = ("passage", "document", "article", "paragraph", "knowledge", "schema", "table")
"""Columns with what a question is about, under other names than those of AROUND."""
CHOICES = ("choices", "options", "endings")
"""Columns with the answers to choose from, without which an answer's letter or number means nothing."""

MEANINGFUL = frozenset(
    {
        *(*AROUND, *TOOLS, "label", "labels", "weight", "train"),
        *(worse for _, worse in PREFERENCES),
        *(*PASSAGES, *CHOICES, "passages", "documents", "premise", "hypothesis"),
        *("image", "images", "audio", "audios", "video", "videos", "chat_template_kwargs"),
    }
)
"""Columns that change what a row teaches. A row is not trained without them unless the user says so."""
BESIDE_TEXT = frozenset(
    {
        *("class", "target", "targets", "sentiment", "intent", "summary", "prompt", "completion"),
        *("instruction", *ANSWERS, *QUESTIONS),
    }
)
"""Further columns that carry meaning beside a text: what the text is to be answered with."""
METADATA = {"oasst": frozenset({"labels"})}
"""Columns of MEANINGFUL that hold something else in a format: judgements about OASST's messages."""
MEANINGFUL_KEYS = (
    *("train_detail", "training_detail", "loss_weight", "loss_mask", "mask"),
    *("image", "images", "audio", "audios", "video", "videos", *TOOLS),
)
"""Keys of turns that change what a row teaches."""

PLAIN_NAME = re.compile(r"[A-Za-z_][\w./@-]*", re.ASCII)
"""Names that an override holds without quotes."""


@dataclass(frozen=True)
class DataFormat:
    """A data format: the columns it is recognised by, and the function that makes examples.

    Attributes:
        known_by: Alternative sets of columns, each sufficient to recognise the format.
        examples: Function that converts records into examples and counts unusable ones.
        optional: Columns that are read if present.
        conversational: True if data.template=auto renders the format with the model's chat template.
        fits: Further condition on the values of a row for the format to be recognised.
    """

    known_by: tuple[tuple[str, ...], ...]
    examples: Examples
    optional: tuple[str, ...] = ()
    conversational: bool = False
    fits: Callable[[Values], bool] = lambda values: True

    @property
    def columns(self) -> set[str]:
        """Every column that the format reads."""
        return {*self.optional, *(column for columns in self.known_by for column in columns)}

    def has_columns(self, values: Values) -> bool:
        """Return True if the values have columns that the format is recognised by."""
        return any(values.keys() >= set(names) for names in self.known_by)


def detect_format(row: RawRow, columns: Mapping[str, str]) -> str:
    """Return the name of the format whose columns a row has.

    Args:
        row: Row to recognise.
        columns: Column of a format -> column of the row, where they differ (data.columns).

    Raises:
        DataError: No format has these columns. The message lists them and those of every format.
    """
    values = _values(row, columns)
    found = _recognised(values)
    pair = next((each for each in PREFERENCES if values.keys() >= set(each)), None)
    better = None if pair is None or pair[0] in columns.values() else pair[0]
    # Where the better answer is a single turn, the conversation lacks it and alone is no example.
    if found is not None and not (better and _is_turn(values[better])):
        return found
    # Preference data is common, and "no known format" would not tell the user why it is refused.
    if pair is not None:
        raise DataError(
            f"{row.where}: {'/'.join(pair)} is preference data, which needs another trainer (DPO). To "
            f"fine-tune on the better answers use {_chosen_hint(values, pair[0])}"
        )
    known = "; ".join(
        f"{name}: {' or '.join('+'.join(required) for required in kind.known_by)}"
        for name, kind in FORMATS.items()
    )
    raise DataError(
        f"{row.where}: no known format has the columns {', '.join(row.values)} (known formats: "
        f"{known}). Map your columns with data.columns."
    )


def _recognised(values: Values) -> str | None:
    """Return the name of the format whose columns the values have, or None."""
    for name, kind in FORMATS.items():
        if kind.fits(values) and kind.has_columns(values):
            return name
    return None


def _chosen_hint(values: Values, name: str) -> str:
    """Return the settings that fine-tune on the better answers of preference data."""
    chosen, asked = values[name], next((each for each in QUESTIONS if each in values), None)
    answer = next((ours for known, ours in ANSWER_TO.items() if known in values), None)
    if isinstance(chosen, str) and answer is not None:
        return f"'data.columns={{{answer}: {name}}}'"
    if isinstance(chosen, list):
        first = chosen[0] if chosen else None
        begins = _is_turn(first) and first.get("role", first.get("from")) in ("assistant", "gpt")
        if not (begins and asked):
            return f"'data.columns={{messages: {name}}}'"
    if asked is None and _is_turn(chosen):
        earlier = next((each for each in ("messages", *CHATS) if each in values), "messages")
        mapping = f"'data.columns={{prompt: {earlier}, completion: {name}}}'"
        return f"data.format=chat_completion {mapping}"
    if asked is None:
        return f"'data.columns={{text: {name}}}'"
    given = "" if asked == "prompt" else f"prompt: {asked}, "
    return f"'data.columns={{{given}completion: {name}}}'"


def _is_turn(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _values(row: RawRow, columns: Mapping[str, str]) -> RowValues:
    """Return a row's values, also under the names of data.columns and without capitals."""
    plain = {name.strip().lower(): name for name in row.values if isinstance(name, str)}
    aliases = {
        ours: theirs for ours, theirs in {**plain, **columns}.items() if theirs in row.values
    }
    # A column of the file keeps its own name where another one has the same without capitals.
    own = {name: name for name in row.values if name not in columns}
    named = {**aliases, **own}
    values = RowValues({ours: row.values[theirs] for ours, theirs in named.items()})
    for ours in columns:
        values.setdefault(ours, None)
    values.names = named
    return values


def to_examples(
    rows: Sequence[RawRow],
    format_name: str,
    columns: Mapping[str, str],
    drops: DropCounts,
    ignored: Sequence[str] = (),
    elsewhere: Sequence[str] = (),
    train_history: bool = False,
) -> list[Example]:
    """Return every usable row as an example, and count the others and the unread columns in `drops`.

    Args:
        rows: Rows as they were read.
        format_name: Key of FORMATS.
        columns: Column of the format -> column of the rows, where they differ.
        drops: Counter of unusable rows, of changes and of unread columns.
        ignored: Columns that are not read, although they may carry meaning (data.ignore_columns).
        elsewhere: Columns that no format reads, but the partition or the mixture (data.group_by).
        train_history: True if the answers of a `history` carry loss (data.train_history).

    Raises:
        DataError: `columns` names a column that the format does not read or that no row has, or the rows
            have a column that carries meaning and is not read.
    """
    kind = FORMATS[format_name]
    _require_columns(rows, format_name, columns)
    records = [(_values(_without(row, ignored), columns), row) for row in rows]
    own = [each for each in records if _is_of(format_name, *each, drops)]
    made = [replace(each, format=format_name) for each in kind.examples(own, drops)]
    unread = _count_columns(records, format_name, drops)
    # Who maps `chosen` has read that the data are preferences, and leaves out the rejected answers.
    mapped = columns.values()
    known = {*ignored, *elsewhere, *(worse for better, worse in PREFERENCES if better in mapped)}
    _refuse_unread(rows, format_name, [name for name in unread if name not in known])
    if format_name == "text":
        # A file of plain text is a book, also if data.format=text names its format.
        made = [replace(each, format=BOOK) if each.row.whole_file else each for each in made]
    if train_history and not kind.conversational:
        made = [replace(each, messages=tuple(map(_as_trained, each.messages))) for each in made]
    return made


def _is_of(format_name: str, values: RowValues, row: RawRow, drops: DropCounts) -> bool:
    """Return False for a row that has the columns of another format only, and count it."""
    kind = FORMATS[format_name]
    if kind.has_columns(values):
        return True
    if (other := _recognised(values)) is None:
        return True  # the format says what the row lacks
    values.usable = False
    words = f"columns of the format {other}, not of {format_name}: put such rows into another file"
    drops.drop(STAGE, words, row.where)
    return False


def _as_trained(message: ChatMessage) -> ChatMessage:
    return replace(message, trained=True)


def _without(row: RawRow, ignored: Sequence[str]) -> RawRow:
    kept = {name: value for name, value in row.values.items() if name not in ignored}
    return replace(row, values=kept) if len(kept) < len(row.values) else row


def _count_columns(
    records: Sequence[Record], format_name: str, drops: DropCounts
) -> dict[str, str]:
    """Count what was changed in the rows and what was not read.

    Returns:
        Unread column or key of a turn, as the file names it -> its name without capitals.
    """
    found: dict[str, str] = {}
    for values, row in records:
        if not values.usable:
            continue
        drops.changed.update(values.changes)
        read = {values.names.get(name) for name in values.taken or FORMATS[format_name].columns}
        unread = {
            name: name.strip().lower()
            for name, value in row.values.items()
            if name not in read and name in values.names.values() and has_value(value)
        }
        unread |= {key: key for key in values.unread}
        drops.unread.update(list(unread))
        found |= unread
    return found


def _refuse_unread(rows: Sequence[RawRow], format_name: str, unread: Sequence[str]) -> None:
    meant = MEANINGFUL - METADATA.get(format_name, frozenset())
    if format_name in TEXT_FORMATS:
        meant |= BESIDE_TEXT
    lowered = [name.strip().lower() for name in unread]
    if {"a", "b"} <= set(lowered):  # the answers to choose from, a column each
        meant |= set("abcdefgh")
    names = [
        name
        for name, lower in zip(unread, lowered, strict=True)
        if lower in meant or name.rpartition("[].")[2] in MEANINGFUL_KEYS
    ]
    if not names:
        return
    listed = ", ".join(names)
    ignored = ", ".join(name if PLAIN_NAME.fullmatch(name) else f'"{name}"' for name in names)
    raise DataError(
        f"{rows[0].where}: the format {format_name} does not read {listed}, which change what a row "
        f"teaches.{_mapping_hint(rows, format_name, names)} To train without use "
        f"'data.ignore_columns=[{ignored}]'."
    )


def _mapping_hint(rows: Sequence[RawRow], format_name: str, names: Sequence[str]) -> str:
    """Return a sentence with the mapping that reads one of the columns, or nothing."""
    columns = [name for name in names if "[]" not in name]
    if format_name in TEXT_FORMATS and columns:
        mapping = f"{{question: text, answer: {columns[0]}}}"
        return f" To train it as the answer use 'data.columns={mapping}'."
    texts = [name for name in columns if any(isinstance(r.values.get(name), str) for r in rows)]
    passage = next((name for name in texts if name.strip().lower() in PASSAGES), None)
    if passage is not None and "context" in FORMATS[format_name].columns:
        return f" To put it into the prompt use 'data.columns={{context: {passage}}}'."
    if any(name.strip().lower() in (*CHOICES, "a") for name in columns):
        return " To train with the choices write them into the question."
    return ""


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
    messages: Messages, records: Sequence[Record], drops: DropCounts
) -> Iterator[Example]:
    for values, row in records:
        try:
            yield Example(messages(values), row, tools=_tools(values))
        except UnusableRow as reason:
            values.usable = False
            drops.drop(STAGE, str(reason), row.where)


def _tools(values: RowValues) -> tuple[Mapping[str, Any], ...]:
    name = values.first(*TOOLS)
    return () if name is None else tools_of(values.take(name))


# Formats with one question and one answer


def _one_answer(
    questions: Sequence[str], answers: Sequence[str], values: RowValues
) -> tuple[ChatMessage, ...]:
    """Convert a question and its answer, with a system prompt, earlier turns and a context."""
    asked = values.first(*questions) or next((n for n in questions if n in values), questions[0])
    answered = values.first(*answers) or next((n for n in answers if n in values), answers[0])
    question = _non_empty(values, asked)
    around = [name for name in ("context", "input") if name not in (asked, answered)]
    extra = "\n\n".join(text for name in around if (text := _optional(values, name)))
    turns = [*_system(values), *_history(values), ChatMessage("user", question, extra)]
    return (*turns, _answer(values, answered))


def _prompt_completion(values: RowValues) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", _text(values, "prompt")), _answer(values, "completion"))


def _plain_text(values: RowValues) -> tuple[ChatMessage, ...]:
    return (_answer(values, "text"),)


def _system(values: RowValues) -> list[ChatMessage]:
    name = values.first(*SYSTEM)
    return [] if name is None else [ChatMessage("system", _text(values, name))]


def _history(values: RowValues) -> list[ChatMessage]:
    """Return the earlier turns, whose answers carry no loss: pairs of texts, or turns with roles."""
    if not has_value(values.get("history")):
        return []
    pairs = turn_list(values, "history")
    if not all(isinstance(pair, list) for pair in pairs):
        return conversation(values, "history", trained=False)
    if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise UnusableRow("history is not a list of questions with their answers")
    return [
        message
        for asked, answered in pairs
        for message in (ChatMessage("user", asked), ChatMessage("assistant", answered, "", False))
    ]


def _optional(values: RowValues, column: str) -> str:
    return _text(values, column) if has_value(values.get(column)) else ""


def _text(values: RowValues, column: str) -> str:
    value = values.take(column)
    if value is None:
        raise UnusableRow(f"no {column}")
    if isinstance(value, float) and math.isnan(value):  # pandas writes missing values so
        raise UnusableRow(f"{column} is NaN")
    if isinstance(value, bool | int | float):  # as a CSV file has them
        return json.dumps(value)
    if not isinstance(value, str):
        raise UnusableRow(f"{column} is a {type(value).__name__}, not text")
    return value


def _non_empty(values: RowValues, column: str) -> str:
    text = _text(values, column)
    if not text.strip():
        raise UnusableRow(f"{column} is empty")
    return text


def _answer(values: RowValues, column: str) -> ChatMessage:
    extra = {}
    if reasoning := values.first(*REASONING):
        extra["reasoning_content"] = _text(values, reasoning)
    if column == "answers":
        return ChatMessage("assistant", _first_answer(values.take(column)), extra=extra)
    return ChatMessage("assistant", _non_empty(values, column), extra=extra)


def _first_answer(value: Any) -> str:
    """Return the first of SQuAD's answers, which are the same answer by several people."""
    found = value.get("text") if isinstance(value, Mapping) else value
    texts = found if isinstance(found, list) else [found]
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise UnusableRow("answers holds no text")
    return texts[0]


# Conversations


def _conversation(columns: Sequence[str], values: RowValues) -> tuple[ChatMessage, ...]:
    """Convert turns, with the system prompt if it has a column of its own."""
    column = next((name for name in columns if name in values), columns[0])
    turns = conversation(values, column)
    system = _system(values)
    repeated = system and turns and turns[0] == system[0]
    return ordered(turns if repeated else [*system, *turns], values)


def _chat_completion(values: RowValues) -> tuple[ChatMessage, ...]:
    """Convert TRL's conversational prompt and completion: only the completion carries loss."""
    asked = _side(values, "prompt", "user", trained=False)
    answer = _side(values, _answered(values), "assistant")
    return ordered([*_system(values), *asked, *answer], values)


def _side(values: RowValues, column: str, role: Role, *, trained: bool = True) -> list[ChatMessage]:
    if isinstance(values.get(column), list | Mapping):
        return conversation(values, column, trained=trained)
    return [ChatMessage(role, _non_empty(values, column))]


def _holds_turns(values: Values) -> bool:
    return _are_turns(values.get("prompt")) or _are_turns(values.get(_answered(values)))


def _answered(values: Values) -> str:
    """Return the name of the answer to a prompt. Other columns of these names are not read."""
    return next((name for name in COMPLETIONS if has_value(values.get(name))), COMPLETIONS[0])


def _are_turns(value: Any) -> bool:
    # The answers of some data sets are lists of texts, of which one is to be chosen.
    return _is_turn(value[0] if isinstance(value, list) and value else value)


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
                turn({"role": node.values.get("role"), "content": node.values.get("text")})
                for node in _best_path(root)
            ]
            yield Example(ordered(turns, RowValues({})), root.row)
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


def _of_rows(messages: Messages) -> Examples:
    return partial(_row_by_row, messages)


CHATS = ("conversations", "conversation", "dialogue", "dialog", "turns")

FORMATS: dict[str, DataFormat] = {
    # detect_format takes the first match. Conversations come first because such rows often have
    # prompt, question or text columns as well.
    "messages": DataFormat(
        (("messages",),), _of_rows(partial(_conversation, ["messages"])), (*SYSTEM, *TOOLS), True
    ),
    "sharegpt": DataFormat(
        tuple((name,) for name in CHATS),
        _of_rows(partial(_conversation, CHATS)),
        (*SYSTEM, *TOOLS),
        True,
    ),
    "oasst": DataFormat(
        (("message_id", "role", "text"), ("message_tree_id", "prompt")),
        _oasst,
        # In files without nulls the root of a tree has no parent_id
        ("parent_id", "rank", "deleted"),
        True,
    ),
    "alpaca": DataFormat(
        tuple(("instruction", name) for name in ANSWERS),
        _of_rows(partial(_one_answer, ("instruction",), ANSWERS)),
        (*AROUND, *TOOLS),
    ),
    "chat_completion": DataFormat(
        tuple(("prompt", name) for name in COMPLETIONS),
        _of_rows(_chat_completion),
        (*SYSTEM, *TOOLS),
        True,
        _holds_turns,
    ),
    "prompt_completion": DataFormat((("prompt", "completion"),), _of_rows(_prompt_completion)),
    "question_answer": DataFormat(
        tuple((question, answer) for question in QUESTIONS[:4] for answer in ANSWERS),
        _of_rows(partial(_one_answer, QUESTIONS[:4], ANSWERS)),
        (*AROUND, *TOOLS),
    ),
    "flan": DataFormat(
        (("inputs", "targets"),),
        _of_rows(partial(_one_answer, ("inputs",), ("targets",))),
        (*AROUND, *TOOLS),
    ),
    "ultrachat": DataFormat(
        (("data",),), _of_rows(partial(_conversation, ["data"])), (*SYSTEM, *TOOLS), True
    ),
    "text": DataFormat((("text",),), _of_rows(_plain_text)),
    BOOK: DataFormat((("text",),), _of_rows(_plain_text)),
}
"""Formats by the name used in data.format. CodeAlpaca is alpaca, and MetaMath is question_answer."""
