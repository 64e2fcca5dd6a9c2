"""Tokenize and batch: examples into token ids with the loss mask, ids into padded tensors.

The prompt is tokenized apart from the completion, so that the mask never depends on how a tokenizer
would merge across the border; the end-of-text token is part of the completion and carries loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sweeper.data.formats import Example
from sweeper.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position without loss (torch.nn.functional.cross_entropy's ignore_index)."""

Tokens = dict[str, list[int]]
"""One example: `input_ids` and `labels`, of one length; labels are IGNORED over the prompt."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized split, and how many examples were too long for it."""

    rows: list[Tokens]
    dropped: int

    @property
    def target_tokens(self) -> int:
        """Positions that carry loss."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenize a split, dropping (and counting) examples of more than `max_length` tokens."""
    rows = [_encode(example, tokenizer) for example in examples]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    return Encoded(kept, len(rows) - len(kept))


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, so answers could never end")
    prompt: list[int] = tokenizer(example.prompt)["input_ids"]
    completion: list[int] = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    completion = [*completion, tokenizer.eos_token_id]
    prompt = prompt[:-1] if prompt[-1:] == [tokenizer.eos_token_id] else prompt
    return {
        "input_ids": prompt + completion,
        "labels": [IGNORED] * len(prompt) + completion,
    }


@dataclass(frozen=True)
class Collator:
    """Pad a batch on the right to its longest row.

    Padding is masked by position, not by token id: many tokenizers pad with the end-of-text token.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of `Tokens` into `input_ids`, `attention_mask` and `labels`, each [batch, length]."""
        length = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in values])

        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
