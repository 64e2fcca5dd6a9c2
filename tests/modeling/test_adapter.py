"""Presets, parameter counts, attach and detach."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import (
    attach,
    count_parameters,
    detach,
    linear_modules,
    load_adapter,
    touches_base,
)
from sweeper.modeling.base_model import load_base
from sweeper.modeling.target_modules import resolve_targets
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS, GROUPED

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
QWEN25_15B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
LLAMA32_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
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
        (QWEN25_15B, "attention_qv", 16, 2_179_072, 1_545_893_376, 0.1410),
        (LLAMA32_3B, "all-linear", 16, 24_313_856, 3_237_063_680, 0.7511),
        (LLAMA3_8B, "attention", 8, 6_815_744, 8_037_076_992, 0.0848),
    ],
)
def test_counts_are_those_of_the_published_runs(  # type: ignore[no-untyped-def]
    config, targets: str, r: int, trainable: int, total: int, percent: float
) -> None:
    """The five reports' models, to the last parameter; PEFT's own count is the same."""
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
        ModelError, match=r"no module named q_proj\. .* c_attn, c_fc, c_proj\. Presets"
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


def _digest(model: torch.nn.Module) -> str:
    """sha256 of every weight of the base, as held (packed weights and their scales included)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _train_two_steps(model: torch.nn.Module) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    ids = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIONS = {
    "plain": [],
    "dora": ["adapter.use_dora=true"],
    "rslora": ["adapter.use_rslora=true"],
    "gaussian": ["adapter.init_lora_weights=gaussian"],
    "olora": ["adapter.init_lora_weights=olora"],
    "bias": ["adapter.bias=all"],
    "bias of targets": ["adapter.bias=lora_only"],
    "last layer": ["adapter.layers_to_transform=last-1"],
    "norms and embeddings": ["adapter.modules_to_save=[norm,embed_tokens]"],
    "patterns": ["+adapter.rank_pattern.q_proj=2", "+adapter.alpha_pattern.v_proj=1"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_detach_gives_back_the_untouched_base_or_says_that_it_does_not(option: str) -> None:
    """After two large training steps the weight hash is the base's, exactly unless touches_base."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])  # its q, k and v have biases
    adapter = _lora("adapter.r=4", *OPTIONS[option])
    before, names = _digest(base), [name for name, _ in base.named_modules()]
    model = attach(base, adapter)
    _train_two_steps(model)
    again = detach(model)
    assert again is base
    assert [name for name, _ in again.named_modules()] == names
    assert (_digest(again) != before) == touches_base(adapter)


@pytest.mark.parametrize(
    ("quantization", "option"),
    [
        *(("nf4", "dora"), ("nf4", "olora"), ("nf4", "norms and embeddings"), ("fp4", "plain")),
        *(("int8", "plain"), ("int8", "olora"), ("int8", "norms and embeddings")),
    ],
)
def test_options_train_on_a_quantized_base(quantization: str, option: str) -> None:
    """What settings let through trains, and the base comes back as touches_base says."""
    overrides = [f"quantization={quantization}", *OPTIONS[option]]
    settings = make_settings(*overrides)
    base = load_base(settings.model, settings.quantization, trained=False)
    before = _digest(base.model)
    model = attach(base.model, _lora(*overrides))
    loss = _first_and_last_loss(model)
    assert loss[1] < loss[0]
    assert (_digest(detach(model)) != before) == touches_base(_lora(*overrides))


def _first_and_last_loss(model: torch.nn.Module) -> tuple[float, float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    ids = torch.randint(0, 2000, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    model.train()
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses[0], losses[-1]


def test_full_fine_tuning_touches_the_base() -> None:
    """Without an adapter the base is what is trained."""
    assert touches_base(make_settings("adapter=none", "quantization=none").adapter)


def test_what_is_refused_on_int8_really_fails_there() -> None:
    """The refusal is no prejudice: PEFT's DoRA raises on bitsandbytes' 8-bit layers."""
    settings = make_settings("quantization=int8")
    base = load_base(settings.model, settings.quantization, trained=False)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError)):
        _first_and_last_loss(get_peft_model(base.model, config))


def test_a_tied_embedding_that_is_trained_stays_tied() -> None:
    """modules_to_save on a tied embedding trains one tensor for embedding and head."""
    base = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, tie_word_embeddings=True))
    model = attach(base, _lora("adapter.modules_to_save=[embed_tokens]"))
    embedding = model.get_input_embeddings().modules_to_save["default"].weight
    head = model.get_output_embeddings().modules_to_save["default"].weight
    assert embedding.requires_grad
    assert embedding.data_ptr() == head.data_ptr()
    again = detach(model)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_a_tied_embedding_that_cannot_stay_tied_is_refused() -> None:
    """GPT-2's embedding has a name that PEFT does not tie."""
    with pytest.raises(ModelError, match="can keep them tied only if they are named"):
        attach(_on_meta(GPT2), _lora("adapter.modules_to_save=[wte]"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("adapter.modules_to_save=[lm_haed]", "no module named lm_haed. Its modules are .*lm_head"),
        ("+adapter.rank_pattern.q_porj=4", "adapter.rank_pattern=.*no module named q_porj"),
        ("+adapter.alpha_pattern.q_porj=4", "adapter.alpha_pattern=.*no module named q_porj"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(override: str, sentence: str) -> None:
    """PEFT ignores such a pattern in silence; here it is named."""
    with pytest.raises(ModelError, match=sentence):
        attach(_on_meta(QWEN3_06B), _lora(override))


def test_olora_on_transposed_weights_is_refused() -> None:
    """PEFT's OLoRA does not know GPT-2's Conv1D."""
    with pytest.raises(ModelError, match="olora does not support"):
        attach(_on_meta(GPT2), _lora("adapter.init_lora_weights=olora"))


def test_rank_and_alpha_patterns_reach_the_modules() -> None:
    """A pattern sets r and alpha of the modules it matches, and alpha_over_r holds there."""
    model = attach(
        AutoModelForCausalLM.from_config(CONFIGS["llama"]),
        _lora("adapter.r=4", "adapter.alpha_over_r=2", "+adapter.rank_pattern.q_proj=8"),
    )
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name.rsplit(".", 1)[-1] for name in found} > {"q_proj"}
    for name, module in found.items():
        assert module.r["default"] == (8 if name.endswith("q_proj") else 4)
        assert module.scaling["default"] == 2


@pytest.mark.slow
def test_an_adapter_that_was_stored_in_half_precision_is_loaded(tmp_path: Path) -> None:
    """PEFT holds its weights in fp32, and that they are rounded is no reason to refuse them."""
    settings = make_settings("quantization=none").adapter
    assert isinstance(settings, LoraAdapter)
    model = attach(AutoModelForCausalLM.from_config(CONFIGS["llama"]), settings)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    halves = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})
    loaded = load_adapter(detach(model), tmp_path)
    assert {weight.dtype for name, weight in loaded.named_parameters() if "lora_" in name} == {
        torch.float32
    }
