"""Token-weighted loss: sum of negative log-likelihood over sum of target tokens.

transformers' own eval_loss is a mean of batch means: on one model and one split it moves by 0.18 nats
with the batch size alone (transformers issue 39241), more than most things a study compares.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.evaluation.chunked_head import Head, states_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LossSum:
    """The negative log-likelihood of an example or a split, in nats, and what it is spread over."""

    nll: float
    tokens: int
    bytes: int | None = None
    """UTF-8 bytes of the target text; None where nobody counted them."""

    @property
    def mean(self) -> float:
        """Nats per target token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean); infinite when that leaves the range of a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nll / (ln 2 · bytes): comparable between models of different tokenizers."""
        assert self.bytes, "count the bytes (target_bytes) before asking for bits per byte"
        return self.nll / (math.log(2) * self.bytes)


def total(losses: Sequence[LossSum]) -> LossSum:
    """The loss of a split from those of its examples."""
    counts = [loss.bytes for loss in losses if loss.bytes is not None]
    return LossSum(
        math.fsum(loss.nll for loss in losses),
        sum(loss.tokens for loss in losses),
        sum(counts) if losses and len(counts) == len(losses) else None,
    )


def target_bytes(rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """UTF-8 bytes of each row's targets as text; special tokens (end of text) have none."""
    return [_bytes_of(row["labels"], tokenizer) for row in rows]


def _bytes_of(labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    spans = itertools.groupby(labels, key=lambda label: label == IGNORED)
    texts = [
        tokenizer.decode(list(span), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ignored, span in spans
        if not ignored
    ]
    return sum(len(text.encode("utf-8")) for text in texts)


def target_nll(
    model: torch.nn.Module, batch: Mapping[str, Tensor], chunk_size: int | None = None
) -> Tensor:
    """Summed negative log-likelihood, in nats, of a batch's target tokens (a scalar with gradient).

    Arguments as for `token_nll`.
    """
    return token_nll(model, batch, chunk_size).sum()


def token_nll(
    model: torch.nn.Module, batch: Mapping[str, Tensor], chunk_size: int | None = None
) -> Tensor:
    """Negative log-likelihood, in nats, of each target token: [targets], rows first.

    The output head is applied only where a row has a target: prompts are most of a batch, and the
    logits of a large vocabulary are most of its memory.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. Its own forward is
            not called where its head is known (`evaluation.head`), so the caller autocasts.
        batch: `labels` [batch, length] and what the model takes (`input_ids`, `attention_mask`, …), on
            the model's device. The label of a position is predicted from the position before it.
        chunk_size: at most so many tokens' logits exist at a time, in the backward as well, which
            computes them a second time; None computes all at once. A sharded model has its own
            (`compute_loss_in_forward`).
    """
    if isinstance(model, FSDPModule):  # its weights are whole inside its outermost forward only
        nll: Tensor = model(**batch)
        return nll
    return _token_nll(model, batch, chunk_size)


def _token_nll(
    model: torch.nn.Module, batch: Mapping[str, Tensor], chunk_size: int | None
) -> Tensor:
    labels = batch["labels"][:, 1:]
    is_target = labels != IGNORED
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    states, head = states_at(model, inputs, pad(is_target, (0, 1)))
    targets = labels[is_target].to(states.device)
    if chunk_size is None or len(targets) <= chunk_size:
        return _nll(head, states, targets)
    parts = zip(torch.split(states, chunk_size), torch.split(targets, chunk_size), strict=True)
    return torch.cat([_recomputed_nll(head, *part) for part in parts])


def compute_loss_in_forward(model: torch.nn.Module, chunk_size: int | None) -> None:
    """Have a model's forward, given labels, return the loss of each target token (`token_nll`).

    DistributedDataParallel learns from the outermost forward which gradients to expect, FSDP gathers
    weights there, and `token_nll` by itself goes around it. Without labels (generation) nothing changes.
    """
    plain = model.forward

    @functools.wraps(plain)  # generate() reads the signature
    def forward(*args: Any, **batch: Any) -> Any:
        return _token_nll(model, batch, chunk_size) if "labels" in batch else plain(*args, **batch)

    model.forward = forward


def _nll(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(states).float(), targets, reduction="none")


def _recomputed_nll(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """As `_nll`, without keeping the logits for the backward."""
    nll = checkpoint(_nll, head, states, targets, use_reentrant=False)
    assert isinstance(nll, Tensor)
    return nll


@torch.no_grad()
def evaluate_examples(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    collator: PaddingCollator,
    batch_size: int,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    row_bytes: Sequence[int] | None = None,
) -> list[LossSum]:
    """The loss of each row, in the order of rows; in fp32 the same to 1e-5 for every batch size.

    Leaves the model in the mode (train or eval) it was in. Tokens are added up in float64. A
    `compute_dtype` below fp32 is autocast to, as in training, whoever calls.

    Args:
        row_bytes: what `target_bytes` counted, if bits per byte are wanted.
    """
    was_training = model.training
    model.eval()
    sums: dict[int, float] = {}
    try:
        for indices in _batches(rows, batch_size):
            batch = collator([rows[index] for index in indices])
            batch = {name: values.to(model.device) for name, values in batch.items()}
            with autocast(model.device, compute_dtype):
                nll = token_nll(model, batch, chunk_size)
            per_row = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
            parts = torch.split_with_sizes(nll.double(), per_row)
            sums |= {index: part.sum().item() for index, part in zip(indices, parts, strict=True)}
    finally:
        model.train(was_training)
    counts = [None] * len(rows) if row_bytes is None else row_bytes
    return [
        LossSum(sums[index], _targets(row), count)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]


def autocast(on: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for dtypes below fp32, nothing for fp32."""
    return torch.autocast(on.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32)


def _targets(row: Tokens) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


def _batches(rows: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length: the order changes no sum, and short rows pad less."""
    ordered = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
