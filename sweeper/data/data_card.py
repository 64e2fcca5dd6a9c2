"""Data card: counts, lengths and sample rows of the data a trial was trained and evaluated on.

The card is written as Markdown for people and as a dict for programs. Three training rows are shown as
the model sees them, with « and » around the text that carries loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sweeper.core.plain_text import in_markdown, visible
from sweeper.data.encode import EncodedSplit, quantile
from sweeper.data.examples import DropCounts
from sweeper.data.tokens import IGNORED, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3
SHOWN_CHARS = 4000
"""Characters shown of one row. A packed row or a block of a book would fill pages."""
ALL = "all"
"""Stand-in for a split's name: rows dropped before the data was split."""
OPENS, CLOSES = "«", "»"


@dataclass(frozen=True)
class LengthSummary:
    """Distribution of the number of tokens per row."""

    min: int
    mean: float
    median: int
    p95: int
    p99: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthSummary:
        """Summarise row lengths. Quantiles are nearest ranks, so each is a length that occurs."""
        return cls(
            min=quantile(lengths, 0),
            mean=fmean(lengths) if lengths else 0.0,
            median=quantile(lengths, 0.5),
            p95=quantile(lengths, 0.95),
            p99=quantile(lengths, 0.99),
            max=quantile(lengths, 1),
        )


@dataclass(frozen=True)
class SplitCard:
    """Counts of one split, from the examples that came in to the rows that the model sees."""

    examples: int
    rows: int
    tokens: int
    target_tokens: int
    truncated: int
    max_length: int
    made: LengthSummary
    """Row lengths before the length policy (data.over_length)."""
    kept: LengthSummary
    """Row lengths after dropping, cutting and packing."""
    dropped: dict[str, dict[str, int]]
    """Counts of dropped rows: stage -> reason -> count."""

    @classmethod
    def of(cls, encoded: EncodedSplit) -> SplitCard:
        """Summarise a tokenized split."""
        return cls(
            examples=encoded.examples,
            rows=len(encoded.rows),
            tokens=encoded.tokens,
            target_tokens=encoded.target_tokens,
            truncated=encoded.truncated,
            max_length=encoded.max_length,
            made=LengthSummary.of(encoded.lengths),
            kept=LengthSummary.of([len(row["input_ids"]) for row in encoded.rows]),
            dropped=_counts(encoded.drops),
        )

    @property
    def target_share(self) -> float:
        """Share of all tokens that carry loss, 0 to 1."""
        return self.target_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataCard:
    """Summary of the data of a trial or a study."""

    source: str
    dropped: dict[str, dict[str, int]]
    """Counts of rows dropped before tokenization: stage -> reason -> count."""
    places: list[tuple[str, str, str, list[str]]]
    """Split (or `all`), stage, reason, and the file and line of a few dropped rows."""
    splits: dict[str, SplitCard]
    shown: list[str]
    """Sample training rows with « » around the text that carries loss."""
    changed: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts of kept rows: split (or `all`) -> what was changed in them -> count."""
    unread: dict[str, int] = field(default_factory=dict)
    """Columns and keys of turns that no format reads, with the number of rows that have a value."""

    @classmethod
    def of(
        cls,
        splits: Mapping[str, EncodedSplit],
        drops: DropCounts,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
    ) -> DataCard:
        """Build the card.

        Args:
            splits: Tokenized splits by name. The sample rows come from `train`.
            drops: Rows dropped while reading, formatting, cleaning and splitting.
            tokenizer: Tokenizer that decodes the sample rows.
            source: Description of the data's origin for people.
        """
        drops_by_split = {ALL: drops, **{name: encoded.drops for name, encoded in splits.items()}}
        return cls(
            source=source,
            dropped=_counts(drops),
            places=[
                (name, stage, reason, list(where))
                for name, split_drops in drops_by_split.items()
                for (stage, reason), where in split_drops.places.items()
            ],
            splits={name: SplitCard.of(encoded) for name, encoded in splits.items()},
            shown=[show(row, tokenizer) for row in _sample_rows(splits["train"].rows)],
            changed={
                name: dict(each.changed) for name, each in drops_by_split.items() if each.changed
            },
            unread=dict(drops.unread),
        )

    def document(self) -> dict[str, Any]:
        """Return the card as a dict that JSON can hold."""
        document = asdict(self)
        for name, card in self.splits.items():
            document["splits"][name]["target_share"] = card.target_share
        return document

    def markdown(self) -> str:
        """Return the card as Markdown."""
        sections = [
            f"# Data card\n\nSource: {in_markdown(self.source)}",
            "## Splits\n\n" + _table(SPLIT_HEAD, [_line(*item) for item in self.splits.items()]),
            "## Tokens per row\n\n" + _table(LENGTH_HEAD, self._length_lines()),
            "## Dropped\n\n" + (_table(DROP_HEAD, self._drop_lines()) or "No rows were dropped."),
            "## Changed\n\n"
            + (_table(CHANGE_HEAD, self._change_lines()) or "No kept rows were changed."),
            "## Not read\n\n"
            + (
                _table(UNREAD_HEAD, [[name, f"{count:,}"] for name, count in self.unread.items()])
                or "Every column with a value is read."
            ),
            f"## Training rows\n\nThe model learns to write the text between {OPENS} and {CLOSES}.",
            *(f"### Row {number}\n\n{_fenced(text)}" for number, text in enumerate(self.shown, 1)),
        ]
        return "\n\n".join(sections) + "\n"

    def _length_lines(self) -> list[list[str]]:
        kinds = [
            (f"{name}, {stage}", lengths)
            for name, card in self.splits.items()
            for stage, lengths in (("as tokenized", card.made), ("as used", card.kept))
        ]
        return [
            [name, *(f"{value:,.0f}" for value in asdict(lengths).values())]
            for name, lengths in kinds
        ]

    def _change_lines(self) -> list[list[str]]:
        return [
            [name, what, f"{count:,}"]
            for name, changes in self.changed.items()
            for what, count in changes.items()
        ]

    def _drop_lines(self) -> list[list[str]]:
        seen = {tuple(key): where for *key, where in self.places}
        counted = [(ALL, self.dropped), *((n, card.dropped) for n, card in self.splits.items())]
        return [
            [name, stage, reason, f"{count:,}", ", ".join(seen.get((name, stage, reason), []))]
            for name, dropped in counted
            for stage, reasons in dropped.items()
            for reason, count in reasons.items()
        ]


SPLIT_HEAD = ("split", "examples", "rows", "tokens", "with loss", "truncated", "max_length")
LENGTH_HEAD = ("split", "min", "mean", "median", "p95", "p99", "max")
CHANGE_HEAD = ("split", "what", "count")
UNREAD_HEAD = ("column", "rows with a value")
DROP_HEAD = ("split", "stage", "reason", "count", "for example")


def show(row: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a row as text, with « » around every run of tokens that carries loss."""
    shown, end, before = "", 0, ""
    # Each run is decoded together with everything before it, because some tokenizers drop leading
    # spaces when a run is decoded alone.
    for is_target, run in groupby(row["labels"], key=lambda label: label != IGNORED):
        end += len(list(run))
        text = str(tokenizer.decode(row["input_ids"][:end], skip_special_tokens=False))
        added, before = text[len(before) :], text
        shown += f"{OPENS}{added}{CLOSES}" if is_target else added
    cut = len(shown) > SHOWN_CHARS  # multiplied with a text below: "" if False
    return shown[:SHOWN_CHARS] + f"… ({len(shown):,} characters)" * cut


def _sample_rows(rows: Sequence[Tokens]) -> list[Tokens]:
    """Return the first, the middle and the last row."""
    # A set, because fewer than three rows give the same place several times.
    places = sorted({round(at * (len(rows) - 1) / (SHOWN - 1)) for at in range(SHOWN)})
    return [rows[place] for place in places]


def _counts(drops: DropCounts) -> dict[str, dict[str, int]]:
    return {stage: dict(counts) for stage, counts in drops.counts.items() if counts}


def _line(name: str, card: SplitCard) -> list[str]:
    counts = (card.examples, card.rows, card.tokens)
    return [
        *(name, *(f"{count:,}" for count in counts)),
        *(f"{card.target_tokens:,} ({card.target_share:.1%})", f"{card.truncated:,}"),
        f"{card.max_length:,}",
    ]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    rule = ["---"] * len(head)
    # Pipes and line breaks in a cell would end the cell or the row.
    cells = [[in_markdown(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *cells))


def _fenced(text: str) -> str:
    """Return a Markdown code block whose fence is longer than any fence in the text."""
    # Training rows may contain fences, and would otherwise break the card's layout.
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{visible(text)}\n{fence}"
