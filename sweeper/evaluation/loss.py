"""Token-weighted loss: sum of negative log-likelihood over sum of target tokens.

transformers' own eval_loss is a mean of batch means: on one model and one split it moves by 0.18 nats
with the batch size alone (transformers issue 39241), more than most things a study compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel, rows: Sequence[Tokens], collator: Collator, batch_size: int
) -> Loss:
    """Judge a model on tokenized rows; the same to 1e-4 for every batch size.

    Leaves the model in the mode (train or eval) it was in. Sums are kept in float64.
    """
    was_training = model.training
    model.eval()
    try:
        nll, tokens = 0.0, 0
        for batch in _batches(rows, batch_size):
            inputs = {name: value.to(model.device) for name, value in collator(batch).items()}
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            nll += _nll(logits, labels)
            tokens += int((labels != IGNORED).sum())
    finally:
        model.train(was_training)
    return Loss(nll, tokens)


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Summed negative log-likelihood of labels [batch, length] under logits [batch, length, vocab]."""
    targets = labels != IGNORED
    losses = cross_entropy(logits[targets].float(), labels[targets], reduction="none")
    return float(losses.double().sum())


def _batches(rows: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Batches of rows of similar length: the order changes no sum, and short rows pad less."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return (list(ordered[start : start + size]) for start in range(0, len(ordered), size))
