"""Encode: a split's examples into rows of tokens that fit the model, and an account of what did not.

Training rows may be left out or cut for their length, as the configuration says, and are counted.
Evaluation rows never are. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sweeper.config.settings import DataSettings
from sweeper.core.errors import DataError
from sweeper.data.examples import DropCounts, Example
from sweeper.data.packing import pack
from sweeper.data.row_formats import UnusableRow
from sweeper.data.templates import PromptTemplate, choose_template
from sweeper.data.tokens import (
    IGNORED,
    EncodedPrompt,
    TokenizerSetup,
    Tokens,
    encode_prompt,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "encode"
TEXT = "text"
AUTO_QUANTILE = 0.99
AUTO_MULTIPLE = 8
"""Lengths of whole multiples use the matrix units of GPUs fully."""
AUTO_CAP = 4096
"""What `auto` never passes: activations grow with the length, and one outlier would set it."""
MOST_CHARS = 32
"""Of a token, in the mean over a text: a longer text than that holds enough tokens."""
SHORTEST_BLOCK = 2
"""A block of one token predicts nothing."""


@dataclass(frozen=True)
class EncodedSplit:
    """A tokenized split, and what became of the rest.

    Attributes:
        rows: what the model sees.
        examples: how many examples came in.
        lengths: tokens of every row before the length policy (of plain texts: of every document).
        max_length: the longest a row may be.
        truncated: rows that lost their end.
        ledger: examples and rows left out, by reason.
    """

    rows: list[Tokens]
    examples: int = 0
    lengths: list[int] = field(default_factory=list)
    max_length: int = 0
    truncated: int = 0
    ledger: DropCounts = field(default_factory=DropCounts)

    @property
    def dropped(self) -> int:
        """Examples and rows left out, whatever the reason."""
        return sum(self.ledger.total.values())

    @property
    def tokens(self) -> int:
        """All positions."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def target_tokens(self) -> int:
        """Positions that carry loss."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def encode_train(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    limit: int | None,
) -> EncodedSplit:
    """Tokenize the training split: too long rows as `over_length` says, packed if asked for.

    Args:
        examples: the split.
        tokenizer: the base's.
        settings: template, train_on, max_length, over_length and packing are read.
        limit: the model's positions, or None where it has no limit.

    Raises:
        DataError: max_length is beyond the model, the template does not fit, or no row is left.
    """
    ledger = DropCounts()
    codec = TokenizerSetup(tokenizer)
    rows = list(_conversations(examples, codec, settings, ledger))
    documents = _documents(examples, codec)
    lengths = [len(row["input_ids"]) for row, _ in rows] + [len(ids) for ids in documents]
    max_length = _max_length(settings, lengths, limit)
    fitted, truncated = _fit(rows, max_length, settings, ledger)
    made = fitted + _blocks(documents, max_length, codec)
    if not made:
        raise DataError(f"no training row is left: {_reasons(ledger, max_length)}")
    if settings.packing:
        made = pack(made, max_length)
    return EncodedSplit(made, len(examples), lengths, max_length, truncated, ledger)


def encode_evaluation(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    limit: int | None,
    block_length: int,
) -> EncodedSplit:
    """Tokenize a split that models are judged on: nothing is cut, left out for its length, or packed.

    Args:
        examples: the split.
        tokenizer: the base's.
        settings: template and train_on are read.
        limit: the model's positions, or None where it has no limit.
        block_length: the training rows' max_length, for plain texts.

    Raises:
        DataError: a row is longer than the model's positions, or no row is left.
    """
    ledger = DropCounts()
    codec = TokenizerSetup(tokenizer)
    rows = [
        row for row in _conversations(examples, codec, settings, ledger) if _is_target(row, ledger)
    ]
    for row, example in rows:
        if limit is not None and len(row["input_ids"]) > limit:
            raise DataError(
                f"{example.row.where}: an evaluation row of {len(row['input_ids'])} tokens, and the "
                f"model has {limit} positions; shorten or remove it (evaluation never truncates)"
            )
    documents = _documents(examples, codec)
    made = [row for row, _ in rows] + _blocks(documents, block_length, codec)
    if not made:
        raise DataError(f"no evaluation row is left: {_reasons(ledger, block_length)}")
    lengths = [len(row["input_ids"]) for row, _ in rows] + [len(ids) for ids in documents]
    longest = max(len(row["input_ids"]) for row in made)
    return EncodedSplit(made, len(examples), lengths, longest, 0, ledger)


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> list[EncodedPrompt]:
    """What generations of these examples start from; plain texts have no prompt and are left out.

    Raises:
        DataError: the template cannot print one of them.
    """
    codec = TokenizerSetup(tokenizer)
    templates = _templates(examples, codec, settings)
    prompts = []
    for example in examples:
        if example.format == TEXT:
            continue
        try:
            prompts.append(encode_prompt(example, codec, templates[example.format]))
        except UnusableRow as reason:
            raise DataError(f"{example.row.where}: {reason}") from None
    return prompts


def encode_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int
) -> list[Tokens]:
    """Plain texts, joined and cut into windows of `length` tokens (the last one may be shorter).

    No more texts are read than hold so many `tokens`.

    Raises:
        DataError: several texts, and no end-of-text token to part them.
    """
    codec = TokenizerSetup(tokenizer)
    documents: list[list[int]] = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        documents.append(codec.ids(text[: left * MOST_CHARS]))
        left -= len(documents[-1])
    return _blocks(documents, length, codec)


Made = tuple[Tokens, Example]
"""A row, and the example it was made of."""


def _conversations(
    examples: Sequence[Example], codec: TokenizerSetup, settings: DataSettings, ledger: DropCounts
) -> Iterator[Made]:
    templates = _templates(examples, codec, settings)
    for example in examples:
        if example.format == TEXT:
            continue
        try:
            rows = tokenize(example, codec, templates[example.format], settings.train_on)
        except UnusableRow as reason:
            ledger.drop(STAGE, str(reason), example.row.where)
        else:
            yield from ((row, example) for row in rows)


def _templates(
    examples: Sequence[Example], codec: TokenizerSetup, settings: DataSettings
) -> dict[str, PromptTemplate]:
    formats = {example.format for example in examples}
    return {name: choose_template(settings.template, name, codec.tokenizer) for name in formats}


def _documents(examples: Sequence[Example], codec: TokenizerSetup) -> list[list[int]]:
    return [codec.ids(example.completion) for example in examples if example.format == TEXT]


def _max_length(settings: DataSettings, lengths: Sequence[int], limit: int | None) -> int:
    if settings.max_length != "auto":
        if limit is not None and settings.max_length > limit:
            raise DataError(
                f"data.max_length={settings.max_length}: the model has {limit} positions; give "
                f"{limit} or less, or auto"
            )
        return settings.max_length
    cap = AUTO_CAP if limit is None else min(limit, AUTO_CAP)
    return min(cap, AUTO_MULTIPLE * math.ceil(quantile(lengths, AUTO_QUANTILE) / AUTO_MULTIPLE))


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed (nearest rank)."""
    ordered = sorted(values) or [0]
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _fit(
    rows: Sequence[Made], max_length: int, settings: DataSettings, ledger: DropCounts
) -> tuple[list[Tokens], int]:
    """The rows that fit, and how many were cut to do so.

    Cutting takes the end: the prompt's start holds the system turn and the begin-of-text token. A cut
    answer keeps no end-of-text token, so nobody learns to stop in the middle of a sentence.
    """
    fitted, truncated = [], 0
    for row, example in rows:
        too_long = len(row["input_ids"]) > max_length
        if too_long and settings.over_length == "drop":
            ledger.drop(STAGE, "longer than max_length", example.row.where)
            continue
        cut = {name: values[:max_length] for name, values in row.items()}
        if _is_target(
            (cut, example), ledger, "its answer lies beyond max_length" if too_long else None
        ):
            fitted.append(cut)
            truncated += too_long
    return fitted, truncated


def _is_target(made: Made, ledger: DropCounts, reason: str | None = None) -> bool:
    row, example = made
    if any(label != IGNORED for label in row["labels"]):
        return True
    ledger.drop(STAGE, reason or "no token carries loss", example.row.where)
    return False


def _blocks(documents: Sequence[list[int]], length: int, codec: TokenizerSetup) -> list[Tokens]:
    """Contiguous blocks of the documents, joined by the end-of-text token; loss is on every token.

    Every block opens as the tokenizer opens a text: some models cannot do without their begin-of-text
    token. A last block of fewer than two tokens is left out.

    Raises:
        DataError: several documents, and no token to part them.
    """
    stream = _joined(documents, codec)
    step = length - len(codec.opening)
    pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
    rows = [codec.opening + piece for piece in pieces]
    return [
        {"input_ids": row, "labels": [IGNORED, *row[1:]]}
        for row in rows
        if len(row) >= SHORTEST_BLOCK
    ]


def _joined(documents: Sequence[list[int]], codec: TokenizerSetup) -> list[int]:
    end = codec.tokenizer.eos_token_id
    if len(documents) > 1 and end is None:
        raise DataError(
            f"{len(documents)} texts to join, and the tokenizer has no end-of-text token to put "
            "between them; set eos_token in the model's tokenizer_config.json"
        )
    stream: list[int] = []
    for index, ids in enumerate(documents):
        stream += [end, *ids] if index else ids
    return stream


def _reasons(ledger: DropCounts, max_length: int) -> str:
    counted = [f"{count} × {reason}" for reason, count in ledger.total.items()]
    return f"{'; '.join(counted) or 'the split is empty'} (max_length {max_length})"
