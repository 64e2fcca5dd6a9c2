"""Collate rows into one sequence without padding, for models whose attention is confined to rows.

Knows the form of such a batch, and nothing of how attention is computed (modeling/row_attention.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch

from sweeper.data.packing import unpack
from sweeper.data.tokens import IGNORED, PaddingCollator

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ROW_ATTENTION = "sdpa_in_rows"
"""Attention implementation of a model that accepts batches of PaddingFreeCollator."""
ROW_BOUNDS = "cu_seq_lens_q"
"""Name of the rows' bounds in a batch. transformers passes this keyword on to every attention."""


@dataclass(frozen=True)
class PaddingFreeCollator:
    """Concatenate the rows of a batch. A pack counts as the rows that it was made from.

    The loss needs no bounds: the first label of a row is IGNORED, so no row predicts the next one.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the rows as one sequence.

        Returns:
            `input_ids`, `labels` and `position_ids`, each [1, all tokens], the bounds [rows + 1] of
            the rows, and a placeholder as `attention_mask`.
        """
        parts = [part for row in rows for part in unpack(row)]
        lengths = [len(part["input_ids"]) for part in parts]
        return {
            "input_ids": _joined(part["input_ids"] for part in parts),
            "labels": _joined(part["labels"] for part in parts),
            "position_ids": _joined(range(length) for length in lengths),
            # The bounds are part of the batch, so a layer that is computed again in the backward pass
            # (activation checkpointing) has those of its own batch
            ROW_BOUNDS: torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            # transformers passes a mask of four dimensions on as it is. Without one it would build a
            # block-diagonal mask of all tokens by all tokens
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        }


def split_by_tokens(batch: Mapping[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """Split a batch without padding into batches of consecutive rows.

    Each has as many rows as fit into `limit` tokens, but at least one.
    """
    bounds = batch[ROW_BOUNDS].tolist()
    last = len(bounds) - 1
    firsts = [0]
    for row in range(1, last):
        if bounds[row + 1] - bounds[firsts[-1]] > limit:
            firsts.append(row)
    return [_rows(batch, first, end) for first, end in pairwise([*firsts, last])]


def without_targets(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch of one row that adds nothing to the loss and its gradients."""
    # The row is computed only to keep the ranks of a sharded model in step, so it may be cheap.
    shortest = int(batch[ROW_BOUNDS].diff().argmin())
    row = _rows(batch, shortest, shortest + 1)
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}


def _rows(batch: Mapping[str, torch.Tensor], first: int, end: int) -> dict[str, torch.Tensor]:
    """Return the rows from `first` to before `end`."""
    bounds = batch[ROW_BOUNDS][first : end + 1]
    tokens = slice(int(bounds[0]), int(bounds[-1]))
    parts = {name: batch[name][:, tokens] for name in ("input_ids", "labels", "position_ids")}
    return {**batch, **parts, ROW_BOUNDS: bounds - bounds[0]}


def _joined(values: Any) -> torch.Tensor:
    return torch.tensor([list(chain.from_iterable(values))])


BatchCollator = PaddingCollator | PaddingFreeCollator


def batch_collator(model: PreTrainedModel | PeftModel, pad_token_id: int) -> BatchCollator:
    """Return the collator of a model's batches: without padding if its attention keeps rows apart."""
    if model.config._attn_implementation == ROW_ATTENTION:
        return PaddingFreeCollator()
    return PaddingCollator(pad_token_id)
