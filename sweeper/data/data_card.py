"""Data card: what a trial was trained and judged on, counted and shown.

For people as Markdown, for machines as a dict. Three rows of every trained split are shown as the model
sees them, the text it learns to write between « and ».
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sweeper.data.encode import EncodedSplit, quantile
from sweeper.data.examples import DropCounts
from sweeper.data.tokens import IGNORED, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3
SHOWN_CHARS = 4000
"""Of a shown row; a packed row or a block of a book goes on for pages."""
ALL = "all"
"""In place of a split's name: left out before there were splits."""
OPENS, CLOSES = "«", "»"


@dataclass(frozen=True)
class LengthSummary:
    """Tokens a row."""

    min: int
    mean: float
    median: int
    p95: int
    p99: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthSummary:
        """Quantiles are nearest ranks: lengths that occur."""
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
    """One split: from the examples that came in to the rows that the model sees."""

    examples: int
    rows: int
    tokens: int
    target_tokens: int
    truncated: int
    max_length: int
    made: LengthSummary
    """Before the length policy."""
    kept: LengthSummary
    dropped: dict[str, dict[str, int]]
    """Stage -> reason -> count."""

    @classmethod
    def of(cls, encoded: EncodedSplit) -> SplitCard:
        """Count a split."""
        return cls(
            examples=encoded.examples,
            rows=len(encoded.rows),
            tokens=encoded.tokens,
            target_tokens=encoded.target_tokens,
            truncated=encoded.truncated,
            max_length=encoded.max_length,
            made=LengthSummary.of(encoded.lengths),
            kept=LengthSummary.of([len(row["input_ids"]) for row in encoded.rows]),
            dropped=_counts(encoded.ledger),
        )

    @property
    def target_share(self) -> float:
        """Of all tokens, those that carry loss."""
        return self.target_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataCard:
    """The data of a trial or a study."""

    source: str
    dropped: dict[str, dict[str, int]]
    """Before tokenization: stage -> reason -> count."""
    places: list[tuple[str, str, str, list[str]]]
    """Split (or `all`), stage, reason, and a few of the files and lines."""
    splits: dict[str, SplitCard]
    shown: list[str]
    """Training rows with « » around what carries loss."""

    @classmethod
    def of(
        cls,
        splits: Mapping[str, EncodedSplit],
        ledger: DropCounts,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
    ) -> DataCard:
        """Make the card.

        Args:
            splits: by name; rows are shown from `train`.
            ledger: what reading, formats and cleaning left out.
            tokenizer: turns the shown rows back into text.
            source: where the data came from, in words.
        """
        ledgers = {ALL: ledger, **{name: encoded.ledger for name, encoded in splits.items()}}
        return cls(
            source=source,
            dropped=_counts(ledger),
            places=[
                (name, stage, reason, list(where))
                for name, one in ledgers.items()
                for (stage, reason), where in one.places.items()
            ],
            splits={name: SplitCard.of(encoded) for name, encoded in splits.items()},
            shown=[show(row, tokenizer) for row in _chosen(splits["train"].rows)],
        )

    def document(self) -> dict[str, Any]:
        """The card for machines."""
        document = asdict(self)
        for name, card in self.splits.items():
            document["splits"][name]["target_share"] = card.target_share
        return document

    def markdown(self) -> str:
        """The card for people."""
        sections = [
            f"# Data card\n\nSource: {self.source}",
            "## Splits\n\n" + _table(SPLIT_HEAD, [_line(*item) for item in self.splits.items()]),
            "## Tokens a row\n\n" + _table(LENGTH_HEAD, self._length_lines()),
            "## Left out\n\n" + (_table(DROP_HEAD, self._drop_lines()) or "Nothing."),
            f"## Training rows\n\nThe model learns to write what stands between {OPENS} and {CLOSES}.",
            *(f"### Row {number}\n\n{_fenced(text)}" for number, text in enumerate(self.shown, 1)),
        ]
        return "\n\n".join(sections) + "\n"

    def _length_lines(self) -> list[list[str]]:
        kinds = [
            (f"{name}, {what}", lengths)
            for name, card in self.splits.items()
            for what, lengths in (("as tokenized", card.made), ("as used", card.kept))
        ]
        return [
            [name, *(f"{value:,.0f}" for value in asdict(lengths).values())]
            for name, lengths in kinds
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


SPLIT_HEAD = ("split", "examples", "rows", "tokens", "with loss", "cut", "max_length")
LENGTH_HEAD = ("split", "min", "mean", "median", "p95", "p99", "max")
DROP_HEAD = ("split", "stage", "reason", "count", "for example")


def show(row: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as text, « » around every run of tokens that carries loss.

    Runs are decoded as what they add to all that stands before: alone, some tokenizers lose spaces.
    """
    shown, end, before = "", 0, ""
    for is_target, run in groupby(row["labels"], key=lambda label: label != IGNORED):
        end += len(list(run))
        text = str(tokenizer.decode(row["input_ids"][:end], skip_special_tokens=False))
        added, before = text[len(before) :], text
        shown += f"{OPENS}{added}{CLOSES}" if is_target else added
    cut = len(shown) > SHOWN_CHARS
    return shown[:SHOWN_CHARS] + f"… ({len(shown):,} characters)" * cut


def _chosen(rows: Sequence[Tokens]) -> list[Tokens]:
    """The first row, the middle one and the last."""
    places = sorted({round(at * (len(rows) - 1) / (SHOWN - 1)) for at in range(SHOWN)})
    return [rows[place] for place in places]


def _counts(ledger: DropCounts) -> dict[str, dict[str, int]]:
    return {stage: dict(counts) for stage, counts in ledger.counts.items() if counts}


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
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *cells))


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
