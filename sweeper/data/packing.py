"""Pack several short rows into one, with attention confined to each of them.

Packed rows have `position_ids` that restart with every example, and no attention mask: from these,
transformers builds a block-diagonal causal mask for sdpa and eager attention, and sequence bounds for
flash attention. Some model classes ignore them, so modeling/packing_proof.py tests the class.
"""

# A 4D mask built here would be used by every layer as it is and so break sliding-window attention.
# transformers' own mask respects each layer's kind of attention.

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from sweeper.data.tokens import IGNORED, Tokens, padded


def pack(rows: Sequence[Tokens], max_length: int) -> list[Tokens]:
    """Put every row into the fullest pack that still has space for it (online best fit).

    The same rows always give the same packs.

    Args:
        rows: Rows of at most `max_length` tokens each, with the first label IGNORED.
        max_length: Maximum tokens of a pack.
    """
    # Rows are taken in their order and packs stay in the order they were opened, so that an ordered
    # training split (data.order_by) stays ordered. Best fit decreasing would sort it by length.
    packs: list[list[Tokens]] = []
    space: list[tuple[int, int]] = []  # (tokens left, index) of each pack with space, sorted
    for row in rows:
        length = len(row["input_ids"])
        at = bisect_left(space, (length, 0))
        left, index = space.pop(at) if at < len(space) else (max_length, len(packs))
        if index == len(packs):
            packs.append([])
        packs[index].append(row)
        if left > length:
            insort(space, (left - length, index))
    return [_joined(pack) for pack in packs]


def _joined(rows: Sequence[Tokens]) -> Tokens:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
    }


def unpack(row: Tokens) -> Iterator[Tokens]:
    """Yield the rows that a pack was made from. A row that is not packed is yielded unchanged."""
    length = len(row["input_ids"])
    starts = [at for at, position in enumerate(row.get("position_ids", [0])) if position == 0]
    for start, end in pairwise([*starts, length]):
        yield {name: row[name][start:end] for name in ("input_ids", "labels")}


@dataclass(frozen=True)
class PackedCollator:
    """Pad packs on the right. The padding counts as one more packed sequence, without loss.

    The batch has no `attention_mask`: given one, transformers ignores where the positions restart.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `position_ids` and `labels`, each [batch, length]."""
        longest = max(len(row["input_ids"]) for row in rows)
        positions = [
            row["position_ids"] + list(range(longest - len(row["position_ids"]))) for row in rows
        ]
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "position_ids": torch.tensor(positions),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }


class FlatCollator:
    """Concatenate a batch into one row without padding, for flash attention."""

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `position_ids` and `labels`, each [1, all tokens], and sequence bounds."""
        flat: dict[str, Any] = self._flatten([part for row in rows for part in unpack(row)])
        return flat


PackingCollator = PackedCollator | FlatCollator


def packing_collator(attn_implementation: str, pad_token_id: int) -> PackingCollator:
    """Return the collator for packed training rows that suits an attention implementation."""
    if attn_implementation == "flash_attention_2":
        return FlatCollator()
    return PackedCollator(pad_token_id)
