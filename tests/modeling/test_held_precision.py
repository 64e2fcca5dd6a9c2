"""The dtypes of trained weights, and of the weights that a quantized base does not quantize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
)

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.evaluation.token_loss import autocast, token_nll
from sweeper.modeling import held_precision
from sweeper.modeling.adapter import attach, hold_trained_in_fp32, load_adapter, trained_dtypes
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.memory_estimate import held_bytes, model_on_meta
from sweeper.modeling.trial_check import size_on_meta
from tests.conftest import make_settings
from tests.modeling.models import GROUPED

BF16 = "model.dtype=bfloat16"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _adapter(*overrides: str) -> LoraAdapter:
    adapter = make_settings(*overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    return adapter


def _load(folder: Path, *overrides: str) -> LoadedBase:
    settings = make_settings(f"model.base_model={folder}", *overrides)
    return load_base(settings.model, settings.quantization, trained=False)


@pytest.mark.parametrize(
    "trained",
    [
        "adapter.bias=none",
        "adapter.modules_to_save=[embed_tokens,lm_head]",
        "adapter.modules_to_save=[norm]",
        "adapter.use_dora=true",
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_trained_weight_is_fp32(trained: str, dtype: torch.dtype) -> None:
    """LoRA, copies of modules_to_save and DoRA's magnitudes are master weights on any base."""
    model = model_on_meta(LlamaConfig(**GROUPED), _adapter(trained, "adapter.r=2"), dtype, "sdpa")
    assert trained_dtypes(model) == {torch.float32}
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
    assert frozen == {dtype}


def test_trained_biases_are_fp32() -> None:
    """Biases that are trained in place become fp32, those that stay frozen do not."""
    adapter = _adapter("adapter.bias=lora_only", "adapter.target_modules=[q_proj]", "adapter.r=2")
    config = LlamaConfig(**GROUPED, attention_bias=True)
    model = model_on_meta(config, adapter, torch.bfloat16, "sdpa")
    biases = {name: p.dtype for name, p in model.named_parameters() if name.endswith("bias")}
    assert {biases[name] for name in biases if "q_proj" in name} == {torch.float32}
    assert {biases[name] for name in biases if "k_proj" in name} == {torch.bfloat16}


def test_tied_copies_stay_tied_in_fp32(tiny_base: Path, tmp_path: Path) -> None:
    """The trained embedding and the trained head of a tied base are one weight."""
    config = LlamaConfig(**{**GROUPED, "tie_word_embeddings": True})
    base = _load(_store(config, tmp_path / "base", tiny_base), "quantization=none", BF16).model
    model = attach(base, _adapter("adapter.modules_to_save=[embed_tokens,lm_head]"))
    copies = {
        module.modules_to_save["default"].weight.data_ptr()
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    assert len(copies) == 1
    assert trained_dtypes(model) == {torch.float32}


def test_a_weight_that_is_trained_in_bf16_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assertion after attaching sees a weight that cannot be converted."""
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    with pytest.raises(AssertionError, match="round its steps"):
        hold_trained_in_fp32(layer)


def test_a_stored_copy_is_loaded_as_it_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    """A judged adapter has the trained embedding itself, not its rounding to bf16."""
    adapter = _adapter("adapter.modules_to_save=[embed_tokens]", "adapter.r=2")
    model = attach(_load(tiny_base, "quantization=none", BF16).model, adapter)
    (wrapper,) = (each for each in model.modules() if isinstance(each, ModulesToSaveWrapper))
    trained = wrapper.modules_to_save["default"].weight
    with torch.no_grad():
        trained.add_(torch.full_like(trained, 1e-5))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(_load(tiny_base, "quantization=none", BF16).model, tmp_path)
    (again,) = (each for each in loaded.modules() if isinstance(each, ModulesToSaveWrapper))
    assert torch.equal(again.modules_to_save["default"].weight, trained)


def test_biases_that_bitsandbytes_would_round_are_refused() -> None:
    """Linear4bit and Linear8bitLt convert a bias in place, whoever trains it."""
    config = LlamaConfig(**GROUPED, attention_bias=True)
    wanted = ("adapter.bias=all", "adapter.r=2", "model.base_model=x")
    with pytest.raises(ModelError, match=r"rounds the biases .* bfloat16"):
        size_on_meta(make_settings(*wanted, "quantization=nf4", BF16).trial, config, CPU)
    for fine in (("quantization=nf4",), ("quantization=none", BF16)):
        assert size_on_meta(make_settings(*wanted, *fine).trial, config, CPU).trainable > 0


def _losses(base: LoadedBase) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the losses of a batch and the gradients of an adapter's weights."""
    torch.manual_seed(0)
    model = attach(base.model, _adapter("adapter.r=4", "adapter.lora_dropout=0.0"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    with autocast(CPU, base.compute_dtype):
        nll = token_nll(model, batch)
    nll.sum().backward()  # type: ignore[no-untyped-call]
    return nll.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _store(config: PretrainedConfig, folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_ends_in_the_compute_dtype_change_no_bit(
    tied: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen embedding and head in bf16: losses and gradients of an NF4 base are those of fp32 ends."""
    config = LlamaConfig(**{**GROUPED, "tie_word_embeddings": tied})
    folder = _store(config, tmp_path / "base", tiny_base)
    base = _load(folder, "quantization=nf4", BF16)
    ends = (base.model.get_input_embeddings(), base.model.get_output_embeddings())
    assert {end.weight.dtype for end in ends} == {torch.bfloat16}
    assert base.model.model.norm.weight.dtype == torch.float32
    found, gradients = _losses(base)
    monkeypatch.setattr(held_precision, "_plain_ends", lambda _: iter(()))
    before = _load(folder, "quantization=nf4", BF16)
    assert before.model.get_output_embeddings().weight.dtype == torch.float32
    expected, expected_gradients = _losses(before)
    assert torch.equal(found, expected)
    assert all(torch.equal(gradients[name], each) for name, each in expected_gradients.items())


def test_an_embedding_that_multiplies_stays_fp32(tiny_base: Path, tmp_path: Path) -> None:
    """Gemma rounds its factor to the weight's dtype, so its embedding and the tied head stay fp32."""
    config = Gemma3TextConfig(**GROUPED, head_dim=32, tie_word_embeddings=True)
    base = _load(_store(config, tmp_path / "base", tiny_base), "quantization=nf4", BF16)
    assert base.model.get_output_embeddings().weight.dtype == torch.float32


LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.slow
def test_an_8b_base_holds_half_as_much_outside_its_quantized_weights() -> None:
    """Llama-3-8B in NF4: embedding and head take 2,004 MiB instead of 4,008."""
    settings = make_settings("quantization=nf4", "adapter.r=16")
    adapter = settings.adapter
    assert isinstance(adapter, LoraAdapter)

    def weights(dtype: torch.dtype) -> float:
        model = model_on_meta(LLAMA3_8B, adapter, dtype, "sdpa")
        return held_bytes(model, settings.quantization, "adamw_torch", CUDA).weights / 2**20

    assert weights(torch.float32) - weights(torch.bfloat16) == pytest.approx(2004, abs=1)
