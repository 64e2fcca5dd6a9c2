"""Collate rows into one sequence without padding, for models whose attention is confined to rows.

Knows the form of such a batch, and nothing of how attention is computed (modeling/row_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch

from sweeper.data.packing import unpack
from sweeper.data.tokens import PaddingCollator

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


def _joined(values: Any) -> torch.Tensor:
    return torch.tensor([list(chain.from_iterable(values))])


BatchCollator = PaddingCollator | PaddingFreeCollator


def batch_collator(model: PreTrainedModel | PeftModel, pad_token_id: int) -> BatchCollator:
    """Return the collator of a model's batches: without padding if its attention keeps rows apart."""
    if model.config._attn_implementation == ROW_ATTENTION:
        return PaddingFreeCollator()
    return PaddingCollator(pad_token_id)
