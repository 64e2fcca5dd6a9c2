"""Values passed between the data stages: rows, examples, and the counts of dropped ones.

    read → rows → format → examples → clean → split → render → tokenize → batch

Every stage takes rows (or examples) and a `DropCounts`, returns those it keeps, and counts the others
in the `DropCounts` with the reason, the file and the line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

SHOWN_PER_REASON = 3
"""Number of dropped rows whose places are kept for each reason."""


@dataclass(frozen=True)
class RawRow:
    """One record as it was read, with its place for messages."""

    values: Mapping[str, Any]
    where: str
    """File and line, or the record's number: `train.jsonl:17`."""


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's `input`: a section of its own in the instruction template, else appended to `content`."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the assistant's answer, or a plain text (one assistant turn)."""

    messages: tuple[ChatMessage, ...]
    row: RawRow
    format: str = "messages"
    """Format of the row, a key of row_formats.FORMATS. data.template=auto chooses by the format."""

    @property
    def completion(self) -> str:
        """The last assistant turn: the reference that generated answers are compared with."""
        return self.messages[-1].content

    @property
    def text(self) -> str:
        """Text of all turns, for duplicate search and length rules."""
        parts = (part for turn in self.messages for part in (turn.content, turn.input) if part)
        return "\n".join(parts)


@dataclass
class DropCounts:
    """Counts of dropped rows by stage and reason, with the places of a few of them."""

    # Reasons are counted by stage because data.max_bad_fraction applies to some stages only.
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    places: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

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

    @property
    def total(self) -> dict[str, int]:
        """Counts by reason, summed over the stages."""
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total.update(counts)
        return dict(total)
