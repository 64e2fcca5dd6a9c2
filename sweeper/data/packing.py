"""Packing: several short rows in one, each as if it stood alone.

Packed rows have `position_ids` that restart with every example, and no attention mask: from these,
transformers builds a block-diagonal causal mask for sdpa and eager attention, and sequence bounds for
flash attention. Whether a model takes them is proven, not believed (`require_isolation`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorWithFlattening

from sweeper.core.errors import ModelError
from sweeper.data.tokens import IGNORED, Tokens, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pack(rows: Sequence[Tokens], max_length: int) -> list[Tokens]:
    """Put every row into the fullest pack that still has room for it (best fit, in the rows' order).

    Packs stand in the order they were begun in, so that an ordered training split stays ordered. The
    same rows give the same packs.

    Args:
        rows: each of at most `max_length` tokens, its first label IGNORED.
        max_length: how long a pack may be.
    """
    packs: list[list[Tokens]] = []
    room: list[tuple[int, int]] = []  # of each pack that has some: tokens left, index; sorted
    for row in rows:
        length = len(row["input_ids"])
        at = bisect_left(room, (length, 0))
        left, index = room.pop(at) if at < len(room) else (max_length, len(packs))
        if index == len(packs):
            packs.append([])
        packs[index].append(row)
        if left > length:
            insort(room, (left - length, index))
    return [_joined(pack) for pack in packs]


def _joined(rows: Sequence[Tokens]) -> Tokens:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
    }


def unpack(row: Tokens) -> Iterator[Tokens]:
    """The rows that a pack was made of; a row that is no pack is its own."""
    length = len(row["input_ids"])
    starts = [at for at, position in enumerate(row.get("position_ids", [0])) if position == 0]
    for start, end in pairwise([*starts, length]):
        yield {name: row[name][start:end] for name in ("input_ids", "labels")}


@dataclass(frozen=True)
class PackedCollator:
    """Pad packs on the right; the padding is a sequence of its own, without loss.

    There is no `attention_mask`: with one, transformers ignores where the positions restart.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Packs into `input_ids`, `position_ids` and `labels`, each [batch, length]."""
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
    """A batch as one row without padding, for flash attention: packs, or rows as they are."""

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows into `input_ids`, `position_ids` and `labels`, each [1, all tokens], and their bounds."""
        flat: dict[str, Any] = self._flatten([part for row in rows for part in unpack(row)])
        return flat


PackingCollator = PackedCollator | FlatCollator


def packing_collator(attn_implementation: str, pad_token_id: int) -> PackingCollator:
    """The collator for packed training rows under an attention implementation."""
    if attn_implementation == "flash_attention_2":
        return FlatCollator()
    return PackedCollator(pad_token_id)


PROBE_TOKENS = (5, 9)
"""Lengths of the two sequences that the proof packs."""
LEAK_SHARE = 0.2
"""Of what reading the neighbour does to the logits: above bf16's noise, far below a leak."""


@torch.no_grad()
def require_isolation(model: PreTrainedModel) -> None:
    """Prove that a packed sequence computes what it computes alone (three forwards of 14 tokens).

    Raises:
        ModelError: it does not; packing would let examples read each other.
    """
    was_training = model.training
    model.eval()
    try:
        isolated = _leak_share(model) <= LEAK_SHARE
    except TypeError:  # its forward takes no position_ids
        isolated = False
    finally:
        model.train(was_training)
    if not isolated:
        raise ModelError(
            f"data.packing=true: {type(model).__name__} with "
            f"{model.config._attn_implementation} attention lets packed examples read each other; "
            "give data.packing=false"
        )


def _leak_share(model: PreTrainedModel) -> float:
    """How far a packed sequence's logits move, relative to a sequence that reads its neighbour."""
    first, second = PROBE_TOKENS
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, first + second + 1, device=model.device)[None] * 7919 % vocabulary
    restarting = torch.cat([torch.arange(first), torch.arange(second)])[None].to(model.device)

    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(**inputs, use_cache=False).logits[:, -second:].float()
        return found

    alone = logits(input_ids=ids[:, first:])
    packed = logits(input_ids=ids, position_ids=restarting)
    reading = logits(input_ids=ids)
    return float((packed - alone).abs().max() / (reading - alone).abs().max())
