"""Token-weighted loss: the sum of negative log-likelihoods over the number of target tokens.

transformers' own eval_loss is a mean of batch means. On one model and one split that mean changes by
0.18 nats with the batch size alone (transformers issue 39241), more than most differences between the
configurations of a study. A nat is the unit of a negative natural logarithm: 1 nat = 1.44 bits.
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

from sweeper.core.stage_words import count
from sweeper.data.padding_free import BatchCollator
from sweeper.data.tokens import IGNORED, Tokens
from sweeper.evaluation.chunked_head import Head, states_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LossSum:
    """Summed negative log-likelihood, in nats, of an example or a split, and its target tokens."""

    nll: float
    tokens: int
    bytes: int | None = None
    """UTF-8 bytes of the target text, or None if they were not counted."""

    @property
    def mean(self) -> float:
        """Nats per target token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per target token: exp(mean), or infinity beyond the range of a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, nll / (ln 2 · bytes), which is comparable between tokenizers."""
        assert self.bytes, "count the bytes (target_bytes) before asking for bits per byte"
        return self.nll / (math.log(2) * self.bytes)


def total(losses: Sequence[LossSum]) -> LossSum:
    """Return the loss of a split, given those of its examples."""
    counts = [loss.bytes for loss in losses if loss.bytes is not None]
    return LossSum(
        math.fsum(loss.nll for loss in losses),
        sum(loss.tokens for loss in losses),
        # A split has bytes only if every example has: a partial sum would be wrong.
        sum(counts) if losses and len(counts) == len(losses) else None,
    )


def target_bytes(rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the UTF-8 bytes of each row's target text. Special tokens (end of text) have none."""
    # Bytes are counted on decoded targets, so that no earlier stage has to pass texts along. The end
    # token adds nats but no bytes: ending the answer is part of the task.
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
    """Return the summed negative log-likelihood, in nats, of a batch's target tokens.

    The result is a scalar with a gradient. The arguments are those of `token_nll`.
    """
    return token_nll(model, batch, chunk_size).sum()


def token_nll(
    model: torch.nn.Module, batch: Mapping[str, Tensor], chunk_size: int | None = None
) -> Tensor:
    """Return the negative log-likelihood, in nats, of each target token.

    The output head is applied only to positions with a target, because prompts are most of a batch and
    the logits of a large vocabulary are most of its memory.

    Args:
        model: A causal language model of transformers, or a PEFT model around one. For a class listed in
            `chunked_head` the model's own forward is not called, so the caller must autocast.
        batch: `labels` [batch, length] and the model's inputs (`input_ids`, `attention_mask`, …), on the
            model's device. The label of a position is predicted from the position before it.
        chunk_size: Number of tokens whose logits exist at a time, or None for all at once. The backward
            pass computes the logits of a chunk again. Ignored for a sharded model, which got its chunk
            size in `compute_loss_in_forward`.

    Returns:
        Losses [targets] in row-major order.
    """
    if isinstance(model, FSDPModule):  # its weights are gathered inside its outermost forward only
        nll: Tensor = model(**batch)
        return nll
    return _token_nll(model, batch, chunk_size)


def _token_nll(
    model: torch.nn.Module, batch: Mapping[str, Tensor], chunk_size: int | None
) -> Tensor:
    labels = batch["labels"][:, 1:]
    is_target = labels != IGNORED
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    # The last position predicts nothing, so the mask is padded by one on the right.
    states, head = states_at(model, inputs, pad(is_target, (0, 1)))
    targets = labels[is_target].to(states.device)
    if chunk_size is None or len(targets) <= chunk_size:
        return _nll(head, states, targets)
    parts = zip(torch.split(states, chunk_size), torch.split(targets, chunk_size), strict=True)
    return torch.cat([_recomputed_nll(head, *part) for part in parts])


def compute_loss_in_forward(model: torch.nn.Module, chunk_size: int | None) -> None:
    """Replace a model's forward by one that returns `token_nll` when given labels.

    Without labels (generation) the model's own forward runs.
    """
    # DistributedDataParallel learns from the outermost forward which gradients to expect, and FSDP
    # gathers weights there. `token_nll` on its own would bypass that forward.
    plain = model.forward

    @functools.wraps(plain)  # generate() reads the signature
    def forward(*args: Any, **batch: Any) -> Any:
        return _token_nll(model, batch, chunk_size) if "labels" in batch else plain(*args, **batch)

    model.forward = forward


def _nll(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    # The softmax is computed in fp32: bfloat16 keeps fewer than three significant digits.
    return cross_entropy(head(states).float(), targets, reduction="none")


def _recomputed_nll(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """Return the same as `_nll`, but compute the logits again in the backward pass."""
    nll = checkpoint(_nll, head, states, targets, use_reentrant=False)
    assert isinstance(nll, Tensor)
    return nll


@torch.no_grad()
def evaluate_examples(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    collator: BatchCollator,
    batch_size: int,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    row_bytes: Sequence[int] | None = None,
) -> list[LossSum]:
    """Return the loss of each row, in the order of the rows.

    In fp32 the losses are the same to 1e-5 for every batch size. The model's mode (train or eval) is
    restored afterwards.

    Args:
        model: Causal language model.
        rows: Tokenized rows.
        collator: Collator that makes a batch which the model accepts.
        batch_size: Number of rows per batch.
        compute_dtype: Data type of autocast, as in training. torch.float32 disables autocast.
        chunk_size: Number of tokens whose logits exist at a time, or None for all at once.
        row_bytes: Result of `target_bytes`, needed for bits per byte.
    """
    was_training = model.training
    model.eval()
    sums: dict[int, float] = {}
    targets = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    try:
        for indices in _batches(rows, batch_size):
            batch = collator([rows[index] for index in indices])
            batch = {name: values.to(model.device) for name, values in batch.items()}
            with autocast(model.device, compute_dtype):
                nll = token_nll(model, batch, chunk_size)
            per_row = [targets[index] for index in indices]
            # Tokens are summed in float64, so that the batch size does not change the rounding.
            parts = torch.split_with_sizes(nll.double(), per_row)
            sums |= {index: part.sum().item() for index, part in zip(indices, parts, strict=True)}
            count(len(sums), len(rows), "rows")
    finally:
        model.train(was_training)
    counts = [None] * len(rows) if row_bytes is None else row_bytes
    return [
        LossSum(sums[index], found, count)
        for index, (found, count) in enumerate(zip(targets, counts, strict=True))
    ]


def autocast(on: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Return an autocast context for a dtype below fp32, and one without effect for fp32."""
    # Training and evaluation autocast alike. Otherwise a trial's loss and that of its stored adapter
    # would differ by the precision. The norms of a k-bit base are fp32, so LoRA needs autocast as well.
    return torch.autocast(on.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32)


def _batches(rows: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Return batches of indices of rows of similar length, so that little padding is computed."""
    ordered = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
