"""Values passed between the data stages: rows, examples, and the counts of dropped ones.

    read → rows → format → examples → clean → split → render → tokenize → batch

Every stage takes rows (or examples) and a `DropCounts`, returns those it keeps, and counts the others
in the `DropCounts` with the reason, the file and the line.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

SHOWN_PER_REASON = 3
"""Number of dropped rows whose places are kept for each reason."""


@dataclass(frozen=True)
class RawRow:
    """One record as it was read, with its place for messages."""

    values: Mapping[str, Any]
    where: str
    """File and line, or the record's number: `train.jsonl:17`."""
    whole_file: bool = False
    """True for the text of a .txt or .md file, which is a book and not a record."""


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's `input`: a section of its own in the instruction template, else appended to `content`."""
    trained: bool = True
    """False for an answer without loss: `weight: 0`, `train: false`, earlier turns of a history."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What only a chat template can print: name, reasoning_content, tool_calls, tool_call_id."""

    @property
    def identity(self) -> list[Any]:
        """The turn as JSON can hold it, for digests. Equal turns have equal lists."""
        # Turns without the later two fields keep the digests that they had before there were any.
        parts: list[Any] = [self.role, self.content, self.input]
        if self.extra or not self.trained:
            parts.append({"trained": self.trained, **self.extra})
        return parts

    @property
    def text(self) -> str:
        """The whole text of the turn, with reasoning and tool calls."""
        extra = json.dumps(self.extra, sort_keys=True, ensure_ascii=False) if self.extra else ""
        return "\n".join(part for part in (self.content, self.input, extra) if part)


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the assistant's answer, or a plain text (one assistant turn)."""

    messages: tuple[ChatMessage, ...]
    row: RawRow
    format: str = "messages"
    """Format of the row, a key of row_formats.FORMATS. data.template=auto chooses by the format."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Descriptions of the functions that the assistant may call, for the chat template."""

    @property
    def completion(self) -> str:
        """The last assistant turn: the reference that generated answers are compared with."""
        last = self.messages[-1]
        calls = last.extra.get("tool_calls")
        return last.content or (json.dumps(calls, ensure_ascii=False) if calls else "")

    @property
    def text(self) -> str:
        """Text of all turns, for duplicate search and length rules."""
        return "\n".join(text for turn in self.messages if (text := turn.text))

    @property
    def identity(self) -> list[Any]:
        """The turns and the tools as JSON can hold them, for digests."""
        turns: list[Any] = [turn.identity for turn in self.messages]
        return [*turns, {"tools": list(self.tools)}] if self.tools else turns


@dataclass
class DropCounts:
    """Counts of dropped rows by stage and reason, with some places, and of changes to the others."""

    # Reasons are counted by stage because data.max_bad_fraction applies to some stages only.
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    places: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    changed: Counter[str] = field(default_factory=Counter)
    """Rows that were kept, by what was changed in them or is remarkable about them."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows with a value in a column, or in a key of a turn, that no format reads."""

    def drop(self, stage: str, reason: str, where: str) -> None:
        """Count one dropped row or example."""
        self.counts[stage][reason] += 1
        # Only a few places are kept: a file may hold millions of bad rows.
        if len(shown := self.places[stage, reason]) < SHOWN_PER_REASON:
            shown.append(where)

    def add(self, other: DropCounts) -> None:
        """Add the counts and places of another instance."""
        for stage, counts in other.counts.items():
            self.counts[stage].update(counts)
        for key, places in other.places.items():
            self.places[key] = [*self.places[key], *places][:SHOWN_PER_REASON]
        self.changed.update(other.changed)
        self.unread.update(other.unread)

    @property
    def total(self) -> dict[str, int]:
        """Counts by reason, summed over the stages."""
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total.update(counts)
        return dict(total)
