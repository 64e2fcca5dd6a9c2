"""Micro-batches are limited in tokens, and every rank has as many of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM

from sweeper.data.padding_free import (
    ROW_BOUNDS,
    PaddingFreeCollator,
    split_by_tokens,
    without_targets,
)
from sweeper.data.tokens import IGNORED, Tokens
from sweeper.evaluation.token_loss import target_nll
from sweeper.modeling.padding_proof import confine_to_rows
from sweeper.training import trainer as trainer_module
from sweeper.training.micro_batch import token_limit
from sweeper.training.rank_batches import NO_ROW, CompletedBatches
from tests.training.batches import count_rows, rows_of
from tests.training.conftest import RunTiny


def _rows(lengths: list[int]) -> list[Tokens]:
    tokens = itertools.count()
    ids = [[next(tokens) for _ in range(length)] for length in lengths]
    return [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 6))
def test_a_split_keeps_every_row_and_the_limit(lengths: list[int], size: int) -> None:
    """Rows stay whole and in order, and there are at most as many parts as by counting rows."""
    rows = _rows(lengths)
    limit = token_limit(rows, size)
    parts = split_by_tokens(PaddingFreeCollator()(rows), limit)
    found = [row.tolist() for part in parts for row in rows_of(part)]
    assert found == [row["input_ids"] for row in rows]
    assert all(part["input_ids"].numel() <= limit for part in parts)
    assert len(parts) <= -(-len(rows) // size)
    for part in parts:
        expected = PaddingFreeCollator()(
            [row for row in rows if row["input_ids"][0] in part["input_ids"]]
        )
        assert {name: values.tolist() for name, values in part.items()} == {
            name: values.tolist() for name, values in expected.items()
        }


def test_a_row_above_the_limit_is_a_part_of_its_own() -> None:
    """A limit of another split never splits a row."""
    parts = split_by_tokens(PaddingFreeCollator()(_rows([3, 50, 4])), 10)
    assert [part[ROW_BOUNDS].tolist() for part in parts] == [[0, 3], [0, 50], [0, 4]]


def test_a_batch_without_targets_has_zero_loss_and_gradients() -> None:
    """A rank with fewer micro-batches than another computes on it, and learns nothing from it."""
    config = LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2},
    )
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    confine_to_rows(model)
    batch = without_targets(PaddingFreeCollator()(_rows([9, 4, 12])))
    assert batch[ROW_BOUNDS].tolist() == [0, 4]
    loss = target_nll(model, batch)
    loss.backward()
    assert loss.item() == 0
    gradients = [weight.grad for weight in model.parameters()]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("rows", "size", "ranks"), [(32, 4, 2), (32, 3, 2), (7, 8, 2), (13, 2, 4), (9, 4, 3), (1, 1, 4)]
)
def test_ranks_train_every_row_once_in_as_many_batches(rows: int, size: int, ranks: int) -> None:
    """Over all ranks each row occurs once, whatever the last batch holds, and the counts are equal."""
    batches = BatchSampler(SequentialSampler(range(rows)), size, drop_last=False)
    completed = CompletedBatches(batches, ranks)
    shards = [
        BatchSamplerShard(completed, ranks, rank, even_batches=False) for rank in range(ranks)
    ]
    found = [list(shard) for shard in shards]
    assert {len(own) for own in found} == {len(shards[0])} == {-(-len(batches) // ranks)}
    trained = [row for own in found for batch in own for row in batch if row != NO_ROW]
    assert sorted(trained) == list(range(rows))
    # A step is the same rows as on one device
    steps = [
        [row for own in turn for row in own if row != NO_ROW] for turn in zip(*found, strict=True)
    ]
    assert list(itertools.chain(*steps)) == list(range(rows))


@pytest.mark.slow
def test_a_trial_fills_its_micro_batches(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No micro-batch has more tokens than its number of longest rows, and fewer of them are needed."""
    seen: list[tuple[int, int]] = []
    nll = trainer_module.target_nll

    def watching(model: Any, batch: Any, *rest: Any) -> torch.Tensor:
        seen.append((batch["input_ids"].numel(), count_rows(batch)))
        return nll(model, batch, *rest)

    monkeypatch.setattr(trainer_module, "target_nll", watching)
    small = ("training.per_device_train_batch_size=5", "training.gradient_accumulation_steps=3")
    outcome, _, folder = run_tiny("t", *small)
    assert outcome.steps == 6
    assert sum(rows for _, rows in seen) == 2 * 32, "two epochs of 15, 15 and 2 rows"
    text = folder.log_text.read_text()
    limit = int(text.partition("at most ")[2].partition(" ")[0].replace(",", ""))
    assert max(tokens for tokens, _ in seen) <= limit
    assert len(seen) <= 2 * (3 + 3 + 1)
