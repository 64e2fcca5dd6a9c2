"""Encode a split's examples as rows of tokens that fit the model, and count the rows that do not.

Over-long training rows are dropped or cut, as data.over_length says, and evaluation rows as
evaluation.over_length says. Does not know files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from sweeper.config.settings import DataSettings
from sweeper.core.errors import DataError
from sweeper.core.stage_words import count
from sweeper.data.examples import DropCounts, Example
from sweeper.data.packing import pack
from sweeper.data.row_formats import BOOK
from sweeper.data.template_fit import TemplateFit, is_text
from sweeper.data.templates import choose_template, render
from sweeper.data.tokens import (
    IGNORED,
    EncodedPrompt,
    TokenizerSetup,
    Tokens,
    encode_prompt,
    rows_digest,
    tokenize_rendered,
)
from sweeper.data.turns import UnusableRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "encode"
AUTO_QUANTILE = 0.99
"""Share of the rows that `auto` does not cut. A judgement: the longest hundredth sets the memory of
all."""
AUTO_MULTIPLE = 8
"""Tokens to whose multiple `auto` rounds up, because GPU matrix units work on multiples of 8."""
AUTO_CAP = 4096
"""Upper limit of `auto` in tokens, so that a few outliers do not set the activation memory."""
MOST_CHARS = 32
"""Upper bound of the mean number of characters per token of a text."""
TOO_LONG, BEYOND = "longer than max_length", "its answer lies beyond max_length"
SHOWN_LONG = 20
"""Number of rows that are named if they are longer than the model's positions."""
SHORTEST_BLOCK = 2
"""Minimum tokens of a block. The first token carries no loss, so one token predicts nothing."""


@dataclass(frozen=True)
class EncodedSplit:
    """A tokenized split and the counts of its dropped and truncated rows.

    Attributes:
        rows: Rows as the model sees them.
        examples: Number of examples that came in.
        lengths: Tokens of every row before the length policy (for plain text: of every document).
        max_length: Upper limit of a row's length in tokens.
        truncated: Number of rows whose end was cut off.
        drops: Dropped examples and rows by reason.
    """

    rows: list[Tokens]
    examples: int = 0
    lengths: list[int] = field(default_factory=list)
    max_length: int = 0
    truncated: int = 0
    drops: DropCounts = field(default_factory=DropCounts)

    @cached_property
    def digest(self) -> str:
        """The sha256 over the rows, in order."""
        return rows_digest(self.rows)

    @property
    def dropped(self) -> int:
        """Number of dropped examples and rows, over all reasons."""
        return sum(self.drops.total.values())

    @property
    def tokens(self) -> int:
        """Number of tokens over all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def target_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def encode_train(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    limit: int | None,
) -> EncodedSplit:
    """Tokenize the training split, apply data.over_length, and pack rows if data.packing is set.

    Args:
        examples: Examples of the split.
        tokenizer: Tokenizer of the base model.
        settings: Data settings: template, train_on, max_length, over_length and packing.
        limit: Number of positions of the model in tokens, or None if it has no limit.

    Raises:
        DataError: max_length exceeds the model's positions, the template does not suit the format, or
            no row is left.
    """
    drops = DropCounts()
    setup = TokenizerSetup(tokenizer)
    rows = list(_conversations(examples, setup, settings, drops))
    documents = _documents(examples, setup, settings, drops)
    lengths = [len(row["input_ids"]) for row, _ in rows] + [len(ids) for ids in documents]
    max_length = _max_length(settings, lengths, limit)
    # Before `_fit`, because too long rows are counted under the
    # same stage and have a limit of their own.
    _tolerate("training", examples, drops, settings)
    fitted, truncated = _fit(rows, max_length, settings, drops)
    made = fitted + _blocks(documents, max_length, setup)
    if not made:
        raise DataError(f"no training row is left: {_reasons(drops, max_length)}")
    _tolerate_length(len(rows), max_length, limit, drops, settings)
    if settings.packing:  # after dropping and cutting, because a pack holds only rows that fit
        made = pack(made, max_length)
    return EncodedSplit(made, len(examples), lengths, max_length, truncated, drops)


def encode_evaluation(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    limit: int | None,
    block_length: int,
    over_length: OverLength = "refuse",
) -> EncodedSplit:
    """Tokenize an evaluation split without packing.

    Args:
        examples: Examples of the split.
        tokenizer: Tokenizer of the base model.
        settings: Data settings: template, train_on and max_bad_fraction.
        limit: Number of positions of the model in tokens, or None if it has no limit.
        block_length: Tokens per block of plain text: max_length of the training split.
        over_length: What happens to rows that are longer than the model's positions
            (evaluation.over_length).

    Raises:
        DataError: Rows are longer than the model's positions, too many rows cannot be encoded, or no
            row is left.
    """
    drops = DropCounts()
    setup = TokenizerSetup(tokenizer)
    rows = [
        row for row in _conversations(examples, setup, settings, drops) if _is_target(row, drops)
    ]
    # Before too long rows leave, because evaluation.over_length asks for that.
    _tolerate("evaluation", examples, drops, settings)
    lengths = [len(row["input_ids"]) for row, _ in rows]
    rows, truncated = _within_positions(rows, limit, over_length, drops)
    documents = _documents(examples, setup, settings, drops)
    made = [row for row, _ in rows] + _blocks(documents, block_length, setup)
    if not made:
        raise DataError(f"no evaluation row is left: {_reasons(drops, block_length)}")
    lengths += [len(ids) for ids in documents]
    longest = max(len(row["input_ids"]) for row in made)
    return EncodedSplit(made, len(examples), lengths, longest, truncated, drops)


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    skip_unusable: bool = False,
) -> list[EncodedPrompt]:
    """Return the prompts to generate answers from. Plain texts have no prompt and are skipped.

    Args:
        examples: Examples whose last answers are the references.
        tokenizer: Tokenizer of the base model.
        settings: Data settings: template and what belongs to it.
        skip_unusable: True to skip examples that the template cannot render, where they are counted
            elsewhere.

    Raises:
        DataError: The template cannot render one of the examples.
    """
    setup = TokenizerSetup(tokenizer)
    fits = _fits(examples, setup, settings)
    prompts = []
    for example in examples:
        if is_text(example):
            continue
        fit = fits[example.format]
        try:
            prompts.append(encode_prompt(fit.fitted(example)[0], setup, fit.template))
        except UnusableRow as reason:
            # Prompts and references must pair up, so a prompt cannot be dropped without notice.
            if not skip_unusable:
                raise DataError(f"{example.row.where}: {reason}") from None
    return prompts


def encode_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int
) -> list[Tokens]:
    """Join plain texts and cut them into windows of `length` tokens (the last may be shorter).

    Args:
        texts: Documents, read only until they hold `tokens` tokens.
        tokenizer: Tokenizer of the base model.
        length: Tokens per window.
        tokens: Number of tokens after which no more documents are read.

    Raises:
        DataError: There are several texts, and the tokenizer has no end-of-text token to separate them.
    """
    setup = TokenizerSetup(tokenizer)
    documents: list[list[int]] = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        # Tokenizing only a prefix keeps a book of many MiB cheap. It still holds `left` tokens.
        documents.append(setup.ids(text[: left * MOST_CHARS]))
        left -= len(documents[-1])
    return _blocks(documents, length, setup)


OverLength = Literal["drop", "truncate", "refuse"]
EncodedRow = tuple[Tokens, Example]
"""A row and the example that it was made from."""


def _conversations(
    examples: Sequence[Example], setup: TokenizerSetup, settings: DataSettings, drops: DropCounts
) -> Iterator[EncodedRow]:
    fits = _fits(examples, setup, settings)
    for place, example in enumerate(examples):
        count(place, len(examples), "rows")
        if example.format == BOOK:
            continue
        fit = fits[example.format]
        try:
            fitted, changes = fit.fitted(example)
            rendered = render(fitted, fit.template, settings.train_on)
            rows = tokenize_rendered(rendered, setup, fit.template)
        except UnusableRow as reason:
            drops.drop(STAGE, str(reason), example.row.where)
        else:
            drops.changed.update(changes | fit.unprinted(fitted, rendered))
            yield from ((row, example) for row in rows)


def _fits(
    examples: Sequence[Example], setup: TokenizerSetup, settings: DataSettings
) -> dict[str, TemplateFit]:
    return {
        name: TemplateFit(
            choose_template(
                settings.template, name, setup.tokenizer, settings.chat_template_kwargs
            ),
            name,
            setup,
            settings.control_tokens,
        )
        for name in sorted({example.format for example in examples})
    }


def _documents(
    examples: Sequence[Example], setup: TokenizerSetup, settings: DataSettings, drops: DropCounts
) -> list[list[int]]:
    books = [example for example in examples if example.format == BOOK]
    fits = _fits(books, setup, settings)
    documents = []
    for example in books:
        fitted, changes = fits[BOOK].fitted(example)
        drops.changed.update(changes)
        documents.append(setup.ids(fitted.messages[-1].content))
    return documents


def _max_length(settings: DataSettings, lengths: Sequence[int], limit: int | None) -> int:
    if settings.max_length != "auto":
        # An error and not the smaller of the two: the user chose the length on purpose.
        if limit is not None and settings.max_length > limit:
            raise DataError(
                f"data.max_length={settings.max_length}: the model has only {limit} positions. Use "
                f"{limit} or less, or auto."
            )
        return settings.max_length
    cap = AUTO_CAP if limit is None else min(limit, AUTO_CAP)
    return min(cap, AUTO_MULTIPLE * math.ceil(quantile(lengths, AUTO_QUANTILE) / AUTO_MULTIPLE))


def quantile(values: Sequence[int], share: float) -> int:
    """Return the nearest-rank quantile: the smallest value that `share` of the values do not exceed."""
    ordered = sorted(values) or [0]
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _fit(
    rows: Sequence[EncodedRow], max_length: int, settings: DataSettings, drops: DropCounts
) -> tuple[list[Tokens], int]:
    """Return the rows that fit, and the number of rows that were cut to fit."""
    fitted, truncated = [], 0
    for row, example in rows:
        too_long = len(row["input_ids"]) > max_length
        if too_long and settings.over_length == "drop":
            drops.drop(STAGE, TOO_LONG, example.row.where)
            continue
        # The end is cut because the start holds the system turn and the begin-of-text token. A cut
        # answer gets no end-of-text token, so that no model learns to stop in mid-sentence.
        cut = {name: values[:max_length] for name, values in row.items()}
        if _is_target((cut, example), drops, BEYOND if too_long else None):
            fitted.append(cut)
            truncated += too_long
    return fitted, truncated


def _within_positions(
    rows: Sequence[EncodedRow], limit: int | None, over_length: OverLength, drops: DropCounts
) -> tuple[list[EncodedRow], int]:
    """Return the evaluation rows that fit the model, and the number of rows that were cut to fit."""
    long = [made for made in rows if limit is not None and len(made[0]["input_ids"]) > limit]
    if not long:
        return list(rows), 0
    # A cut or dropped evaluation row changes what the metric measures, so the user decides.
    if over_length == "refuse":
        shown = ", ".join(
            f"{row.row.where} ({len(t['input_ids'])})" for t, row in long[:SHOWN_LONG]
        )
        more = ", …" if len(long) > SHOWN_LONG else ""
        raise DataError(
            f"{len(long)} of {len(rows)} evaluation rows are longer than the model's {limit} positions "
            f"(row and tokens): {shown}{more}. Shorten or remove them, or use "
            "evaluation.over_length=drop or evaluation.over_length=truncate"
        )
    kept, truncated = [], 0
    for row, example in rows:
        if len(row["input_ids"]) <= (limit or 0):
            kept.append((row, example))
        elif over_length == "drop":
            drops.drop(STAGE, "longer than the model's positions", example.row.where)
        else:
            cut = {name: values[:limit] for name, values in row.items()}
            if _is_target((cut, example), drops, "its answer lies beyond the model's positions"):
                kept.append((cut, example))
                truncated += 1
    return kept, truncated


def _tolerate(
    split: str, examples: Sequence[Example], drops: DropCounts, settings: DataSettings
) -> None:
    """Raise if more rows cannot be encoded than data.max_bad_fraction allows."""
    bad = drops.counts[STAGE]
    if bad.total() <= settings.max_bad_fraction * len(examples):
        return
    lines = [
        f"  {count} × {reason}: {', '.join(drops.places[STAGE, reason])}"
        for reason, count in bad.most_common()
    ]
    raise DataError(
        "\n".join(
            [
                f"{bad.total()} of {len(examples)} {split} rows cannot be encoded, more than the "
                f"{settings.max_bad_fraction:.3%} that data.max_bad_fraction allows:",
                *lines,
                "Fix these rows, choose another data.template, or raise data.max_bad_fraction to skip "
                "them.",
            ]
        )
    )


def _tolerate_length(
    rows: int, max_length: int, limit: int | None, drops: DropCounts, settings: DataSettings
) -> None:
    """Raise if more rows are too long than data.max_bad_fraction allows."""
    long = drops.counts[STAGE][TOO_LONG] + drops.counts[STAGE][BEYOND]
    capped = max_length in (AUTO_CAP, limit)
    by_choice = settings.max_length == "auto" and not capped  # auto leaves out the longest percent
    if by_choice or long <= settings.max_bad_fraction * rows:
        return
    remedy = "" if settings.max_length == "auto" else "data.max_length=auto or a larger one, "
    cut = "" if settings.over_length == "truncate" else "data.over_length=truncate, "
    raise DataError(
        f"{long} of {rows} training rows are longer than {max_length} tokens (data.max_length="
        f"{settings.max_length}), more than the {settings.max_bad_fraction:.3%} that "
        f"data.max_bad_fraction allows. Use {remedy}{cut}or a larger data.max_bad_fraction to do "
        "without them."
    )


def _is_target(made: EncodedRow, drops: DropCounts, reason: str | None = None) -> bool:
    row, example = made
    if any(label != IGNORED for label in row["labels"]):
        return True
    drops.drop(STAGE, reason or "no token carries loss", example.row.where)
    return False


def _blocks(documents: Sequence[list[int]], length: int, setup: TokenizerSetup) -> list[Tokens]:
    """Return contiguous blocks of the documents, with loss on every token but a block's first.

    Args:
        documents: Token ids of each document. The end-of-text token is put between two documents.
        length: Tokens per block. A last block of fewer than two tokens is dropped.
        setup: Tokenizer of the base model.

    Raises:
        DataError: There are several documents, and the tokenizer has no token to separate them.
    """
    stream = _joined(documents, setup)
    # Some models need their begin-of-text token, so every block starts with the opening tokens.
    step = length - len(setup.opening)
    pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
    rows = [setup.opening + piece for piece in pieces]
    return [
        {"input_ids": row, "labels": [IGNORED, *row[1:]]}
        for row in rows
        if len(row) >= SHORTEST_BLOCK
    ]


def _joined(documents: Sequence[list[int]], setup: TokenizerSetup) -> list[int]:
    end = setup.tokenizer.eos_token_id
    if len(documents) > 1 and end is None:
        raise DataError(
            f"{len(documents)} texts must be joined, but the tokenizer has no end-of-text token to "
            "separate them. Set eos_token in the model's tokenizer_config.json."
        )
    stream: list[int] = []
    for index, ids in enumerate(documents):
        stream += [end, *ids] if index else ids
    return stream


def _reasons(drops: DropCounts, max_length: int) -> str:
    counted = [f"{count} × {reason}" for reason, count in drops.total.items()]
    return f"{'; '.join(counted) or 'the split is empty'} (max_length {max_length})"
