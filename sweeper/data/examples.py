"""What travels between the stages: rows, examples, and the count of what was left out.

    read → rows → format → examples → clean → split → render → tokenize → batch

Every stage takes rows (or examples) and a `Ledger`, and returns those it lets through; what it drops,
it writes into the ledger with the reason, the file and the line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

SHOWN_PER_REASON = 3
"""How many of the dropped rows a ledger keeps to show for each reason."""


@dataclass(frozen=True)
class RawRow:
    """One record as it was read, and where it stands, for messages to people."""

    values: Mapping[str, Any]
    where: str
    """`train.jsonl:17`: the file and the line, or the record's number."""


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's input: a section of its own in the instruction template, appended elsewhere."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the assistant's answer, or a plain text (one assistant turn)."""

    messages: tuple[ChatMessage, ...]
    row: RawRow
    format: str = "messages"
    """The format it was read in (a key of formats.FORMATS): `template=auto` chooses by it."""

    @property
    def completion(self) -> str:
        """The last assistant turn: what generations are compared with."""
        return self.messages[-1].content

    @property
    def text(self) -> str:
        """All that was said, for digests, duplicate search and length rules."""
        parts = (part for turn in self.messages for part in (turn.content, turn.input) if part)
        return "\n".join(parts)


@dataclass
class DropCounts:
    """What was dropped, by stage and reason, with a few of the places."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    places: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, stage: str, reason: str, where: str) -> None:
        """Count one dropped row or example."""
        self.counts[stage][reason] += 1
        if len(shown := self.places[stage, reason]) < SHOWN_PER_REASON:
            shown.append(where)

    def add(self, other: DropCounts) -> None:
        """Take over what another ledger counted."""
        for stage, counts in other.counts.items():
            self.counts[stage].update(counts)
        for key, places in other.places.items():
            self.places[key] = [*self.places[key], *places][:SHOWN_PER_REASON]

    @property
    def total(self) -> dict[str, int]:
        """Dropped by reason, over all stages."""
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total.update(counts)
        return dict(total)
