"""Token-weighted loss: sum of negative log-likelihood over sum of target tokens.

transformers' own eval_loss is a mean of batch means: on one model and one split it moves by 0.18 nats
with the batch size alone (transformers issue 39241), more than most things a study compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from sweeper.data.tokens import IGNORED, Collator, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loss:
    """The negative log-likelihood of a split, in nats, and the number of tokens it is over."""

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per target token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean); infinite when that leaves the range of a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def target_nll(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Summed negative log-likelihood, in nats, of a batch's target tokens (a scalar with gradient).

    Logits are computed only at positions where some row has a target: prompts are most of a batch, and
    the output head over a large vocabulary is most of its memory.

    Args:
        model: a causal language model of transformers.
        batch: `input_ids`, `attention_mask` and `labels`, each [batch, length], on the model's device.
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=positions,
        use_cache=False,
    ).logits
    return cross_entropy(
        logits.float().flatten(0, 1),
        labels[:, positions].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    collator: Collator,
    batch_size: int,
    compute_dtype: torch.dtype = torch.float32,
) -> Loss:
    """Judge a model on tokenized rows; in fp32 the same to 1e-4 for every batch size.

    Leaves the model in the mode (train or eval) it was in. Batches are added up in float64. A
    `compute_dtype` below fp32 is autocast to, as in training, whoever calls.
    """
    was_training = model.training
    model.eval()
    try:
        nll, tokens = 0.0, 0
        for rows_of_batch in _batches(rows, batch_size):
            batch = {key: value.to(model.device) for key, value in collator(rows_of_batch).items()}
            with autocast(model.device, compute_dtype):
                nll += float(target_nll(model, batch))
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    finally:
        model.train(was_training)
    return Loss(nll, tokens)


def autocast(on: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for dtypes below fp32, nothing for fp32."""
    return torch.autocast(on.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32)


def _batches(rows: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Batches of rows of similar length: the order changes no sum, and short rows pad less."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return (list(ordered[start : start + size]) for start in range(0, len(ordered), size))
