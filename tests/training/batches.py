"""The rows of a batch, with padding or without."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from sweeper.data.padding_free import ROW_BOUNDS


def rows_of(batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The token ids of each row of a batch, with its padding or without."""
    ids = batch["input_ids"]
    if ROW_BOUNDS not in batch:
        return list(ids)
    bounds = batch[ROW_BOUNDS].tolist()
    return [ids[0, start:end] for start, end in itertools.pairwise(bounds)]


def count_rows(batch: Mapping[str, torch.Tensor]) -> int:
    """How many rows a batch has."""
    return len(rows_of(batch))
