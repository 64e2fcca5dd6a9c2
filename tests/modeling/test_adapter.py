"""Presets, parameter counts, attach and detach."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from sweeper.errors import ModelError
from sweeper.modeling.adapter import attach, count_parameters, detach, linear_modules
from sweeper.modeling.base import load_base
from sweeper.modeling.targets import resolve_targets
from sweeper.settings import LoraAdapter
from tests.conftest import make_settings

GPT2 = GPT2Config()
QWEN3_06B = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
)
SEVEN = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


def _lora(*overrides: str) -> LoraAdapter:
    adapter = make_settings(*overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    return adapter


def _on_meta(config):  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "targets", "r", "trainable", "total", "percent"),
    [
        (GPT2, "[c_attn]", 8, 294_912, 124_734_720, 0.2364),
        (GPT2, "attention_qv", 8, 294_912, 124_734_720, 0.2364),
        (QWEN3_06B, SEVEN, 32, 20_185_088, 616_235_008, 3.2756),
        (QWEN3_06B, "all-linear", 32, 20_185_088, 616_235_008, 3.2756),
    ],
)
def test_counts_are_those_of_the_published_runs(  # type: ignore[no-untyped-def]
    config, targets: str, r: int, trainable: int, total: int, percent: float
) -> None:
    """gpt2 with r=8 on c_attn and Qwen3-0.6B with r=32 on seven modules, to the last parameter."""
    model = attach(_on_meta(config), _lora(f"adapter.r={r}", f"adapter.target_modules={targets}"))
    count = count_parameters(model)
    assert (count.trainable, count.total) == (trainable, total)
    assert count.percent == pytest.approx(percent, abs=5e-5)
    assert model.get_nb_trainable_parameters() == (trainable, total)


def test_counts_of_a_full_fine_tune_are_the_whole_base() -> None:
    """Without an adapter everything is trained."""
    count = count_parameters(_on_meta(GPT2))
    assert count.trainable == count.total == 124_439_808
    assert count.percent == 100


def test_counts_of_a_4bit_base_are_what_it_stands_for() -> None:
    """Packed 4-bit weights count as the weights they hold: the same as without quantization."""
    counts = []
    for quantization in ("none", "nf4"):
        settings = make_settings(f"quantization={quantization}")
        base = load_base(settings.model, settings.quantization, trained=False)
        counts.append(count_parameters(attach(base.model, _lora())))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("preset", "endings"),
    [
        ("attention_qv", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_presets_of_a_llama(preset: str, endings: set[str]) -> None:
    """A preset names the modules that the architecture has."""
    assert set(resolve_targets(preset, linear_modules(_on_meta(QWEN3_06B)))) == endings


def test_presets_of_gpt2_tell_its_two_c_proj_apart() -> None:
    """GPT-2 calls both output projections c_proj; the presets keep attention and MLP apart."""
    names = linear_modules(_on_meta(GPT2))
    assert resolve_targets("attention", names) == ["attn.c_attn", "attn.c_proj"]
    assert resolve_targets("mlp", names) == ["mlp.c_fc", "mlp.c_proj"]


def test_a_target_that_matches_nothing_lists_what_exists() -> None:
    """A misspelt module is answered with the modules and the presets."""
    names = linear_modules(_on_meta(GPT2))
    with pytest.raises(
        ModelError, match=r"no module named q_proj; .* c_attn, c_fc, c_proj; presets"
    ):
        resolve_targets(["c_attn", "q_proj"], names)


def test_detach_gives_back_the_very_base() -> None:
    """After attach, a change of the adapter, and detach, the base computes what it did before."""
    settings = make_settings()
    base = load_base(settings.model, settings.quantization, trained=False)
    ids = torch.arange(20).unsqueeze(0)
    before = base.model(ids).logits
    model = attach(base.model, _lora())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
    assert not torch.allclose(model(ids).logits, before)
    again = detach(model)
    assert again is base.model
    assert torch.equal(base.model(ids).logits, before)
    assert not any("lora" in name for name, _ in base.model.named_modules())
