"""Tokenize and pad: examples into token ids with the loss mask, ids into tensors.

The mask follows the spans of the rendered text. Prompt tokens are exactly those that generation starts
from: a token never reaches from a prompt into its answer. Knows nothing of files and lengths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, takewhile
from typing import TYPE_CHECKING, Any

import torch

from sweeper.core.errors import DataError
from sweeper.data.examples import Example
from sweeper.data.templates import PromptTemplate, RenderedText, Span, TrainOn, render, render_last

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position without loss (torch.nn.functional.cross_entropy's ignore_index)."""

Tokens = dict[str, list[int]]
"""One row: `input_ids` and `labels`, of one length; labels are IGNORED where there is no loss.

The first label is always IGNORED: nothing stands before it to predict it from. Packed rows also have
`position_ids`.
"""


@dataclass(frozen=True)
class TokenizerSetup:
    """A tokenizer, and what is asked of it for every row but never changes."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        """A text's ids, with nothing put before or behind it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def opening(self) -> list[int]:
        """What the tokenizer itself puts before a text: the begin-of-text token, or nothing."""
        special = set(self.tokenizer.convert_tokens_to_ids(list(self.special)))
        dressed: list[int] = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return list(takewhile(special.__contains__, dressed))

    @cached_property
    def special(self) -> tuple[str, ...]:
        """Every token that is no text, as it is written."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special}
        return tuple(names.union(self.tokenizer.all_special_tokens))

    @cached_property
    def swallowing(self) -> frozenset[int]:
        """Ids of added tokens that take the blanks behind them along (rstrip: Phi-3's <|end|>)."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(number for number, token in added if token.rstrip)


def tokenize(
    example: Example, codec: TokenizerSetup, template: PromptTemplate, train_on: TrainOn
) -> list[Tokens]:
    """The rows of one example: one, or one per answer where `render` prints them apart.

    Raises:
        Unusable: the template cannot print it.
        DataError: nothing ends the answer, and the tokenizer has no end-of-text token.
    """
    rendered = render(example, template, train_on)
    return [_row(text, codec, whole=template.owns_tokens) for text in rendered]


@dataclass(frozen=True)
class EncodedPrompt:
    """What a generation starts from, and what it is compared with."""

    input_ids: list[int]
    text: str
    reference: str
    end_token_id: int
    """What ends an answer: chat templates often end it with another token than the tokenizer's own."""


def encode_prompt(
    example: Example, codec: TokenizerSetup, template: PromptTemplate
) -> EncodedPrompt:
    """Everything before the last answer, ending with the generation prompt; the answer is the reference.

    For one question and its answer, the ids are the first ids of the row that `tokenize` makes.

    Raises:
        Unusable: the template cannot print it.
    """
    rendered = ended(render_last(example.messages, template), codec)
    ids, borders = _ids(rendered, codec, whole=template.owns_tokens)
    start, end = rendered.spans[-1]
    before = ids[: borders[start]] or codec.opening
    return EncodedPrompt(before, rendered.text[:start], example.completion, ids[borders[end] - 1])


def _row(rendered: RenderedText, codec: TokenizerSetup, *, whole: bool) -> Tokens:
    text = ended(rendered, codec)
    ids, borders = _ids(text, codec, whole=whole)
    labels = [IGNORED] * len(ids)
    for start, end in text.spans:
        labels[borders[start] : borders[end]] = ids[borders[start] : borders[end]]
    labels[:1] = [IGNORED]
    return {"input_ids": ids, "labels": labels}


def ended(rendered: RenderedText, codec: TokenizerSetup) -> RenderedText:
    """The text with every answer's end in the loss, and nothing behind it: a model must learn to stop.

    An answer ends with a special token of the template's. A text that no special token ends gets the
    tokenizer's end-of-text token. The line break that many chat templates print behind it is never
    generated and carries no loss.
    """
    text = rendered.text
    if not text.rstrip().endswith(codec.special):
        if codec.tokenizer.eos_token is None:
            raise DataError(NO_END)
        text += codec.tokenizer.eos_token
    *others, (start, end) = rendered.spans
    reaches_the_end = not rendered.text[end:].strip()
    spans = [*others, (start, len(text) if reaches_the_end else end)]
    return RenderedText(
        text, tuple((first, _stop(text, first, last, codec)) for first, last in spans)
    )


NO_END = (
    "the tokenizer has no end-of-text token, and the template ends answers with no other: they could "
    "never end; set eos_token in the model's tokenizer_config.json, or give a template that ends "
    "answers with a special token"
)


def _stop(text: str, start: int, end: int, codec: TokenizerSetup) -> int:
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(codec.special) else end


def _ids(
    rendered: RenderedText, codec: TokenizerSetup, *, whole: bool
) -> tuple[list[int], dict[int, int]]:
    """The ids of a text, and for each border of its spans the number of tokens before it."""
    borders = sorted({0, *(border for span in rendered.spans for border in span)})
    if whole and codec.tokenizer.is_fast:
        return _whole(rendered.text, borders, codec)
    ids, counts = _cut(rendered.text, borders, codec)
    before = codec.opening
    if whole or ids[: len(before)] == before:  # the template has printed it
        return ids, counts
    shifted = {border: count + len(before) * (border > 0) for border, count in counts.items()}
    return before + ids, shifted


def _whole(
    text: str, borders: Sequence[int], codec: TokenizerSetup
) -> tuple[list[int], dict[int, int]]:
    """The ids of apply_chat_template; a token that reaches over a border belongs to the answer.

    Almost all chat templates put a special token or a line break there, which no token reaches over.
    Otherwise the answer's first characters would be left without loss.
    """
    found = codec.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = found["input_ids"]
    places = zip(ids, found["offset_mapping"], strict=True)
    ends = [_end(text, place, token, codec) for token, place in places]  # they never decrease
    return ids, {border: bisect_right(ends, border) for border in borders}


def _end(text: str, place: Span, token: int, codec: TokenizerSetup) -> int:
    """Where a token's own text ends: the blanks it has swallowed draw it over no border."""
    start, end = place
    return start + len(text[start:end].rstrip()) if token in codec.swallowing else end


def _cut(
    text: str, borders: Sequence[int], codec: TokenizerSetup
) -> tuple[list[int], dict[int, int]]:
    """The ids of the whole text where they begin with those of every head, else of its pieces.

    The whole is preferred because some tokenizers put a space before every text they get.
    """
    ids = codec.ids(text)
    heads = {border: codec.ids(text[:border]) for border in borders if 0 < border < len(text)}
    if all(ids[: len(head)] == head for head in heads.values()):
        counts = {border: len(head) for border, head in heads.items()}
        return ids, {0: 0, **counts, len(text): len(ids)}
    ends = [*borders[1:], len(text)]
    pieces = [codec.ids(text[start:end]) for start, end in zip(borders, ends, strict=True)]
    totals = accumulate(map(len, pieces), initial=0)
    return list(chain.from_iterable(pieces)), dict(zip([*borders, len(text)], totals, strict=True))


@dataclass(frozen=True)
class PaddingCollator:
    """Pad a batch on the right to its longest row.

    Padding is masked by position, not by token id: many tokenizers pad with the end-of-text token.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of `Tokens` into `input_ids`, `attention_mask` and `labels`, each [batch, length]."""
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }


def padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Rows of different lengths as one tensor, filled up on the right: [batch, longest]."""
    length = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
