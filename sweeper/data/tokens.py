"""Tokenize examples with their loss mask, and pad token ids to tensors.

The mask follows the spans of the rendered text. The prompt tokens of a training row are exactly those
that generation starts from: no token spans the boundary of a prompt and its answer. Does not know files
or length limits.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
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
"""Label of a position without loss: ignore_index of torch.nn.functional.cross_entropy."""

LITERAL_MARK = "\ufdd0"
"""Character put into a control token that is to be encoded as text. Unicode gives it no other use."""

Tokens = dict[str, list[int]]
"""One row: `input_ids` and `labels` of equal length. Labels are IGNORED where there is no loss.

The first label is always IGNORED, because no token precedes it to predict it from. Packed rows also
have `position_ids`.
"""


def rows_digest(rows: Iterable[Tokens]) -> str:
    """Return the sha256 over the rows' values, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            # The length keeps apart [1], [2, 3] and [1, 2], [3]. JSON takes four times as long.
            digest.update(f"{name} {len(row[name])} ".encode())
            digest.update(array("i", row[name]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenizerSetup:
    """A tokenizer with the properties that are computed once and used for every row."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        """Return a text's token ids without added special tokens."""
        if LITERAL_MARK in text:
            return self._literal_ids(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _literal_ids(self, text: str) -> list[int]:
        """Return the ids of a text in which marked control tokens are encoded as text."""
        # The text is cut at its real control tokens, where every tokenizer cuts it as well.
        ids: list[int] = []
        for part in self._control.split(text):
            if self._control.fullmatch(part):
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                plain = part.replace(LITERAL_MARK, "")
                ids += self.tokenizer(
                    plain, add_special_tokens=False, split_special_tokens=True, verbose=False
                )["input_ids"]
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str]:
        names = sorted(filter(None, self.special), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @cached_property
    def opening(self) -> list[int]:
        """Ids that the tokenizer puts before every text: the begin-of-text token, or none."""
        special = set(self.tokenizer.convert_tokens_to_ids(list(self.special)))
        complete: list[int] = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return list(takewhile(special.__contains__, complete))

    @cached_property
    def special(self) -> tuple[str, ...]:
        """Text of every special token."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special}
        return tuple(names.union(self.tokenizer.all_special_tokens))

    @cached_property
    def absorbing(self) -> frozenset[int]:
        """Ids of added tokens that absorb the white space after them (rstrip, as in Phi-3's <|end|>)."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(number for number, token in added if token.rstrip)


def tokenize(
    example: Example, setup: TokenizerSetup, template: PromptTemplate, train_on: TrainOn
) -> list[Tokens]:
    """Return the rows of one example: one row for each text that `render` returns.

    Raises:
        UnusableRow: The template cannot render the example.
        DataError: No special token ends the answer, and the tokenizer has no end-of-text token.
    """
    rendered = render(example, template, train_on)
    return tokenize_rendered(rendered, setup, template)


def tokenize_rendered(
    rendered: Iterable[RenderedText], setup: TokenizerSetup, template: PromptTemplate
) -> list[Tokens]:
    """Return a row for each rendered text.

    Raises:
        DataError: No special token ends the answer, and the tokenizer has no end-of-text token.
    """
    return [_row(text, setup, whole=template.owns_tokens) for text in rendered]


@dataclass(frozen=True)
class EncodedPrompt:
    """The prompt of one generated answer, and the reference to compare the answer with."""

    input_ids: list[int]
    text: str
    reference: str
    end_token_id: int
    """Id of the token that ends the answer. Chat templates often use another one than the tokenizer."""


def encode_prompt(
    example: Example, setup: TokenizerSetup, template: PromptTemplate
) -> EncodedPrompt:
    """Return everything before the last answer, ending with the generation prompt, and the answer.

    For one question and its answer, the ids are the first ids of the row that `tokenize` returns.

    Raises:
        UnusableRow: The template cannot render the example.
    """
    rendered = with_answer_end(render_last(example.messages, template, example.tools), setup)
    ids, borders = _ids(rendered, setup, whole=template.owns_tokens)
    start, end = rendered.spans[-1]
    # An empty prompt still needs one token to generate from.
    before = ids[: borders[start]] or setup.opening
    text, reference = (
        each.replace(LITERAL_MARK, "") for each in (rendered.text[:start], example.completion)
    )
    return EncodedPrompt(before, text, reference, ids[borders[end] - 1])


def _row(rendered: RenderedText, setup: TokenizerSetup, *, whole: bool) -> Tokens:
    text = with_answer_end(rendered, setup)
    ids, borders = _ids(text, setup, whole=whole)
    labels = [IGNORED] * len(ids)
    for start, end in text.spans:
        labels[borders[start] : borders[end]] = ids[borders[start] : borders[end]]
    # With a first label a packed row would predict it from the last token of its neighbour.
    labels[:1] = [IGNORED]
    return {"input_ids": ids, "labels": labels}


def with_answer_end(rendered: RenderedText, setup: TokenizerSetup) -> RenderedText:
    """Return the text with the end token of every answer in the loss, and nothing after that token.

    An answer ends with a special token of the template. A text that does not end with a special token
    gets the tokenizer's end-of-text token.

    Raises:
        DataError: An end-of-text token is needed, and the tokenizer has none.
    """
    # A model must learn to stop. The line break that many chat templates print after the end token is
    # never generated: as a token that is always right it would only lower the loss.
    text = rendered.text
    if not text.rstrip().endswith(setup.special):
        if setup.tokenizer.eos_token is None:
            raise DataError(NO_END)
        text += setup.tokenizer.eos_token
    *others, (start, end) = rendered.spans
    reaches_the_end = not rendered.text[end:].strip()
    spans = [*others, (start, len(text) if reaches_the_end else end)]
    return RenderedText(
        text, tuple((first, _span_end(text, first, last, setup)) for first, last in spans)
    )


NO_END = (
    "the tokenizer has no end-of-text token, and the template does not end answers with a special "
    "token, so that a model could not learn to stop. Set eos_token in the model's "
    "tokenizer_config.json, or use a template that ends answers with a special token."
)


def _span_end(text: str, start: int, end: int, setup: TokenizerSetup) -> int:
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(setup.special) else end


def _ids(
    rendered: RenderedText, setup: TokenizerSetup, *, whole: bool
) -> tuple[list[int], dict[int, int]]:
    """Return the ids of a text, and for each boundary of its spans the number of tokens before it."""
    borders = sorted({0, *(border for span in rendered.spans for border in span)})
    if whole and setup.tokenizer.is_fast and LITERAL_MARK not in rendered.text:
        return _whole(rendered.text, borders, setup)
    ids, counts = _cut(rendered.text, borders, setup)
    before = setup.opening
    if whole or ids[: len(before)] == before:  # the template has rendered the opening tokens
        return ids, counts
    shifted = {border: count + len(before) * (border > 0) for border, count in counts.items()}
    return before + ids, shifted


def _whole(
    text: str, borders: Sequence[int], setup: TokenizerSetup
) -> tuple[list[int], dict[int, int]]:
    """Return the ids that apply_chat_template gives. A token across a boundary belongs to the answer."""
    # A chat template's text is never cut. Almost all templates put a special token or a line break at
    # the boundary, which no token crosses. Where one does, its loss is kept, or the first characters
    # of the answer would carry none.
    found = setup.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = found["input_ids"]
    places = zip(ids, found["offset_mapping"], strict=True)
    ends = [_end(text, place, token, setup) for token, place in places]  # they never decrease
    return ids, {border: bisect_right(ends, border) for border in borders}


def _end(text: str, place: Span, token: int, setup: TokenizerSetup) -> int:
    """Return the end of a token's own text, without the white space that an rstrip token absorbs."""
    start, end = place
    return start + len(text[start:end].rstrip()) if token in setup.absorbing else end


def _cut(
    text: str, borders: Sequence[int], setup: TokenizerSetup
) -> tuple[list[int], dict[int, int]]:
    """Return the ids of the whole text if no token crosses a boundary, else those of its pieces."""
    # The whole text is preferred because tokenizers like Llama 2's put a space before every text that
    # they get, so also before every piece.
    ids = setup.ids(text)
    heads = {border: setup.ids(text[:border]) for border in borders if 0 < border < len(text)}
    if all(ids[: len(head)] == head for head in heads.values()):
        counts = {border: len(head) for border, head in heads.items()}
        return ids, {0: 0, **counts, len(text): len(ids)}
    ends = [*borders[1:], len(text)]
    pieces = [setup.ids(text[start:end]) for start, end in zip(borders, ends, strict=True)]
    totals = accumulate(map(len, pieces), initial=0)
    return list(chain.from_iterable(pieces)), dict(zip([*borders, len(text)], totals, strict=True))


@dataclass(frozen=True)
class PaddingCollator:
    """Pad a batch on the right to its longest row.

    Padding is masked by position, not by token id, because many tokenizers pad with the end-of-text
    token.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` of the rows, each [batch, length]."""
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }


def padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Return rows of different lengths as one tensor [batch, longest], padded on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
