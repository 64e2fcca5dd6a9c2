"""Packed rows compute what their examples compute alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    set_seed,
)

from sweeper.data.encode import encode_train
from sweeper.data.packing import (
    FlatCollator,
    PackedCollator,
    pack,
    packing_collator,
    unpack,
)
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from tests.conftest import make_settings
from tests.data.chat import byte_level, task

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "mistral with a sliding window": MistralConfig(**SMALL, sliding_window=6),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
}


def _model(config: PretrainedConfig, attention: str = "sdpa") -> Any:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # a fresh model hardly attends; this one does
    return model.eval()


def _rows(*lengths: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ([IGNORED] * 2 + ids[2:])[:length]})
    return rows


def _nll(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Summed loss by torch alone, from the whole logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum"))


FAST = {("mistral with a sliding window", "sdpa"), ("gpt2", "eager")}


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=() if (name, attention) in FAST else pytest.mark.slow)
        for name in CONFIGS
        for attention in ("sdpa", "eager")
    ],
)
def test_packed_loss_is_that_of_unpadded_single_rows(name: str, attention: str) -> None:
    """Per token to 1e-5 in fp32, for two packs of different lengths in one batch, and when padded."""
    model = _model(CONFIGS[name], attention)
    rows = _rows(9, 17, 4, 12, 3, 20)
    tokens = sum(label != IGNORED for row in rows for label in row["labels"])
    alone = sum(_nll(model, PaddingCollator(0)([row])) for row in rows) / tokens
    packs = pack(rows, 35)
    assert len(packs) == 2
    assert _nll(model, PackedCollator(0)(packs)) / tokens == pytest.approx(alone, abs=1e-5)
    assert _nll(model, PaddingCollator(0)(rows)) / tokens == pytest.approx(alone, abs=1e-5)


def test_packing_with_an_attention_mask_would_leak() -> None:
    """The test above can fail: with a mask of ones, or without positions, examples read each other."""
    model = _model(CONFIGS["llama"])
    rows = _rows(9, 17)
    alone = sum(_nll(model, PaddingCollator(0)([row])) for row in rows)
    batch = PackedCollator(0)(pack(rows, 35))
    leaking = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert abs(_nll(model, leaking) - alone) > 0.01


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int]) -> None:
    """Every row is in exactly one pack, whole; no pack is too long; the result never varies."""
    rows = _rows(*lengths)
    packs = pack(rows, 20)
    assert max(len(one["input_ids"]) for one in packs) <= 20
    key = str
    assert sorted((row for one in packs for row in unpack(one)), key=key) == sorted(rows, key=key)
    assert pack(rows, 20) == packs
    total = sum(lengths)
    assert len(packs) <= 2 * -(-total // 20), "at most one pack is half empty"


def test_best_fit_takes_the_fullest_pack_with_room() -> None:
    """Rows of 7, 5, 3 and 4 into packs of 10: 7+3 and 5+4, in the order they were begun."""
    packs = pack(_rows(7, 5, 3, 4), 10)
    assert [[len(row["input_ids"]) for row in unpack(one)] for one in packs] == [[7, 3], [5, 4]]
    assert packs[0]["position_ids"] == [*range(7), *range(3)]


def test_no_example_is_predicted_from_its_neighbour() -> None:
    """The first label of every packed example is ignored, also with train_on=everything."""
    settings = make_settings(
        "data.packing=true", "data.train_on=everything", "data.max_length=64"
    ).data
    examples = [task("Add.", "", str(number)) for number in range(6)]
    encoded = encode_train(examples, byte_level(), settings, None)
    assert len(encoded.rows) < 6
    for one in encoded.rows:
        starts = [at for at, position in enumerate(one["position_ids"]) if position == 0]
        assert [one["labels"][at] for at in starts] == [IGNORED] * len(starts)


def test_flash_attention_gets_one_flat_row_with_bounds() -> None:
    """Without padding: packs are taken apart, and cu_seq_lens says where each sequence ends."""
    collator = packing_collator("flash_attention_2", 0)
    assert isinstance(collator, FlatCollator)
    rows = _rows(7, 5, 3, 4)
    batch = collator(pack(rows, 10))
    assert batch["input_ids"].shape == (1, 19)
    assert "attention_mask" not in batch
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 10, 15, 19]
    assert batch["max_length_q"] == 7
    assert batch["position_ids"][0].tolist() == [*range(7), *range(3), *range(5), *range(4)]
    assert isinstance(packing_collator("sdpa", 0), PackedCollator)
