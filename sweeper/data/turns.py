"""Convert the turns of conversations, in the words that published data use for them, into messages.

Reads the layouts of OpenAI, ShareGPT and tool-calling data. A conversation is put in order where only
one order is meant, and each change is noted in the row's values. Does not know templates or tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sweeper.data.examples import ChatMessage, Role
from sweeper.data.row_files import BadRow, checked_values

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer", "client", "person"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("agent", "claude", "gemini", "llama"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
"""Roles by the words for them, in lower case."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of ShareGPT turns whose whole text is a tool call of the assistant as JSON."""
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that templates and data use for the reasoning before an answer."""
TRAINED_KEYS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a turn that say whether an answer carries loss."""
HANDED_OVER = ("name", "tool_call_id")
"""Keys of a turn that only chat templates print."""
TURN_KEYS = frozenset(
    {
        *ROLE_KEYS,
        *CONTENT_KEYS,
        *REASONING,
        *TRAINED_KEYS,
        *HANDED_OVER,
        "tool_calls",
        "function_call",
    }
)
PAIRS = (("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("input", "output"))
"""Names of the question and the answer where a turn holds both."""

FOLLOWS: dict[str, tuple[Role, ...]] = {
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


class UnusableRow(Exception):
    """Reason why a row cannot become an example, as counted in `DropCounts`."""


class RowValues(dict[str, Any]):
    """A row's values, with a record of those that were read and of what was changed.

    Attributes:
        taken: Columns that were read.
        unread: Keys of turns that have a value and were not read, as `messages[].key`.
        changes: What was changed to make an example of the row, in words.
        usable: False if the row was dropped.
        names: The name of each column in the file, by the name that the formats know.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.taken: set[str] = set()
        self.unread: set[str] = set()
        self.changes: set[str] = set()
        self.usable = True
        self.names: dict[str, str] = {}

    def take(self, column: str) -> Any:
        """Return the value of a column, or None, and record that the column is read."""
        self.taken.add(column)
        return self.get(column)

    def first(self, *columns: str) -> str | None:
        """Return the first of the columns that has a value, or None."""
        return next((name for name in columns if has_value(self.get(name))), None)


def has_value(value: object) -> bool:
    """Return False for None, NaN and empty texts, lists and objects, which hold nothing to lose."""
    if isinstance(value, float) and math.isnan(value):
        return False
    return not (value is None or (isinstance(value, str | list | dict) and not value))


def conversation(values: RowValues, column: str, *, trained: bool = True) -> list[ChatMessage]:
    """Return the turns of a column, whichever way they are written.

    Args:
        values: Values of the row.
        column: Column that holds the list of turns.
        trained: False if none of the turns carries loss.

    Raises:
        UnusableRow: The column holds no turns, or a turn cannot be read.
    """
    items = turn_list(values, column)
    if items and all(isinstance(item, str) for item in items):
        turns = [ChatMessage(("user", "assistant")[at % 2], text) for at, text in enumerate(items)]
    else:
        turns = [turn for item in items for turn in _turns(item, values, column)]
    if trained:
        return turns
    return [replace(each, trained=each.role != "assistant") for each in turns]


def turn_list(values: RowValues, column: str) -> list[Any]:
    """Return a column's list. It may be JSON text, in an object's `messages`, or a single turn.

    Raises:
        UnusableRow: The column holds something else.
    """
    value = values.take(column)
    if value is None:
        raise UnusableRow(f"no {column}")
    # A CSV file has only texts
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = _parsed(value, f"{column} is a text that is not JSON")
    if isinstance(value, Mapping):
        wrapped = isinstance(value.get("messages"), list)
        values.unread |= {
            f"{column}[].{key}"
            for key, item in value.items()
            if wrapped and key != "messages" and has_value(item)
        }
        value = value["messages"] if wrapped else [value]
    if not isinstance(value, list):
        raise UnusableRow(f"{column} is a {type(value).__name__}, not a list of turns")
    return value


def _turns(item: Any, values: RowValues, column: str) -> list[ChatMessage]:
    if not isinstance(item, Mapping):
        raise UnusableRow(f"a turn is a {type(item).__name__}, not an object")
    if not any(key in item for key in ROLE_KEYS):
        for asked, answered in PAIRS:
            if asked in item and answered in item:
                return [
                    ChatMessage("user", content(item[asked], "user")),
                    ChatMessage("assistant", content(item[answered], "assistant")),
                ]
    for key in item:
        if key not in TURN_KEYS and has_value(item[key]):
            values.unread.add(f"{column}[].{key}")
    return [turn(item)]


def turn(item: Mapping[str, Any]) -> ChatMessage:
    """Return one turn of role/content (OpenAI), from/value (ShareGPT) or similar names.

    Raises:
        UnusableRow: The role is unknown, or the content is not text.
    """
    given = next((item[key] for key in ROLE_KEYS if item.get(key) is not None), None)
    said = next((item[key] for key in CONTENT_KEYS if item.get(key) is not None), None)
    word = given.strip().lower() if isinstance(given, str) else None
    if word in CALL_ROLES:
        return ChatMessage("assistant", "", extra={"tool_calls": _calls(_parsed(said))})
    if word not in ROLES:
        raise UnusableRow(f"unknown role {given!r}")
    role = ROLES[word]
    extra: dict[str, Any] = {key: item[key] for key in HANDED_OVER if has_value(item.get(key))}
    if reasoning := next((item[key] for key in REASONING if has_value(item.get(key))), None):
        extra["reasoning_content"] = content(reasoning, role)
    # `function_call` is OpenAI's name from before there were several calls in a turn.
    if calls := item.get("tool_calls") or item.get("function_call"):
        extra["tool_calls"] = _calls(_parsed(calls))
    return ChatMessage(role, content(said, role), trained=_trained(item), extra=extra)


def _trained(item: Mapping[str, Any]) -> bool:
    """Return False if a turn's own keys say that it carries no loss."""
    for key in TRAINED_KEYS:
        if (value := item.get(key)) is None:
            continue
        if value not in (0, 1):
            raise UnusableRow(f"{key} of a turn is {value!r}, and only 0 and 1 can be honoured")
        if not value:
            return False
    return True


def content(value: Any, role: Role) -> str:
    """Return the text of a turn, also if it is given in parts.

    Raises:
        UnusableRow: The content is not text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if role == "tool" and isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, list):
        raise UnusableRow(f"the content of a turn is a {type(value).__name__}, not text")
    return "".join(_part(part, role) for part in value)


def _part(part: Any, role: Role) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise UnusableRow(f"a part of the {role} turn is {kind}, not text")
    return text


def _parsed(value: Any, problem: str = "tools or a tool call are not JSON") -> Any:
    """Return what a text holds as JSON, and any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
        # Escapes inside the text hide what was looked for in the row.
        checked_values({"value": found})
    except (ValueError, RecursionError):
        raise UnusableRow(problem) from None
    except BadRow as bad:
        raise UnusableRow(bad.reason) from None
    return found


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return tool calls as OpenAI writes them, with `arguments` as an object."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise UnusableRow("a tool call has no function name")
        # Llama 3.1 names the arguments `parameters`.
        arguments = _parsed(call.get("arguments") or call.get("parameters") or {})
        if not isinstance(arguments, Mapping):
            raise UnusableRow(f"the arguments of a tool call are a {type(arguments).__name__}")
        made = {"name": call["name"], "arguments": dict(arguments)}
        identity = {"id": item["id"]} if item.get("id") else {}
        calls.append({**identity, "type": "function", "function": made})
    return calls


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the functions that a row offers, as OpenAI writes them, without nulls.

    Raises:
        UnusableRow: The value is not a list of functions.
    """
    found = _parsed(value)
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise UnusableRow("tools are not a list of functions")
    # Arrow gives every object of a column the keys of all others, with null.
    clean = [_without_nulls(item) for item in found]
    return tuple(
        item if "function" in item else {"type": "function", "function": item} for item in clean
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def ordered(turns: Sequence[ChatMessage], values: RowValues) -> tuple[ChatMessage, ...]:
    """Return a valid conversation that ends with a trained answer, and note what was changed.

    Args:
        turns: Turns as they were read.
        values: Values of the row, whose `changes` are extended.

    Raises:
        UnusableRow: A turn is empty, the roles do not alternate, or no answer carries loss.
    """
    # An empty system turn is left out without being counted, because it holds nothing.
    kept = list(turns)
    if kept and kept[0].role == "system" and not kept[0].content.strip():
        kept = kept[1:]
    answers = [each for each in kept if each.role == "assistant"]
    if not answers:
        raise UnusableRow("no assistant turn")
    if not any(each.trained for each in answers):
        raise UnusableRow("no assistant turn carries loss")
    while not (kept[-1].role == "assistant" and kept[-1].trained):
        kept = kept[:-1]
        values.changes.add("turns after the last trained answer left out")
    for each in kept:
        if not each.content.strip() and "tool_calls" not in each.extra:
            raise UnusableRow(f"an empty {each.role} turn")
    kept = _without_greeting(_merged(kept, values), values)
    before = "the start"
    for each in kept:
        if each.role not in FOLLOWS[before]:
            raise UnusableRow(f"roles out of order: {each.role} after {before}")
        before = each.role
    return tuple(kept)


def _merged(turns: Sequence[ChatMessage], values: RowValues) -> list[ChatMessage]:
    """Return the turns with consecutive ones of the same role joined by a blank line."""
    merged: list[ChatMessage] = []
    for each in turns:
        last = merged[-1] if merged else None
        if last is None or last.role != each.role or each.role == "tool":
            merged.append(each)
            continue
        if last.trained != each.trained or last.extra or each.extra:
            raise UnusableRow(f"two {each.role} turns in a row that cannot be merged")
        merged[-1] = replace(last, content=f"{last.content}\n\n{each.content}")
        values.changes.add(f"consecutive {each.role} turns merged")
    return merged


def _without_greeting(turns: Sequence[ChatMessage], values: RowValues) -> list[ChatMessage]:
    """Return the turns without an answer that precedes the first question."""
    # Templates do not render a conversation that begins with an answer, and Gemma's refuses it.
    at = 1 if turns[0].role == "system" else 0
    if len(turns) > at + 1 and turns[at].role == "assistant":
        values.changes.add("an assistant turn before the first user turn left out")
        return [*turns[:at], *turns[at + 1 :]]
    return list(turns)
