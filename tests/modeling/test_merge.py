"""A merged model is the base with its adapter, to the last digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import attach
from sweeper.modeling.merge import merge
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS, save

IDS = torch.arange(3, 40).unsqueeze(0)


def _adapter_of(base: Path, folder: Path, *overrides: str) -> torch.Tensor:
    """Save an adapter whose every trained weight moved; the logits of base + adapter."""
    adapter = make_settings("adapter.r=4", *overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    torch.manual_seed(1)
    model = attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(str(folder))
    logits: torch.Tensor = model.eval()(IDS).logits.detach()
    return logits


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(IDS).logits.detach()
    return logits


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", []),
        ("gpt2", ["adapter.bias=all"]),
        ("qwen2", ["adapter.use_dora=true", "+adapter.rank_pattern.q_proj=2"]),
        ("qwen2", ["adapter.init_lora_weights=olora"]),
        ("gemma2", ["adapter.modules_to_save=[embed_tokens]"]),  # tied to its head
    ],
)
def test_merged_logits_are_those_of_base_and_adapter(
    architecture: str, overrides: list[str], tmp_path: Path
) -> None:
    """In fp32 equal to 1e-5; the tokenizer comes along; nothing of PEFT is left."""
    base = save(CONFIGS[architecture], tmp_path / "base")
    tuned = _adapter_of(base, tmp_path / "adapter", *overrides)
    assert (tuned - _logits(base)).abs().max() > 1e-3
    merge(base, tmp_path / "adapter", tmp_path / "merged", "float32")
    merged = _logits(tmp_path / "merged")
    assert torch.allclose(merged, tuned, atol=1e-5 * float(tuned.abs().max()), rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a b")["input_ids"]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert list((tmp_path / "merged").glob("*.safetensors"))


def test_merged_weights_have_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    """bfloat16 halves the file."""
    base = save(CONFIGS["llama"], tmp_path / "base")
    _adapter_of(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    """A 4-bit base would round the training away."""
    base = save(CONFIGS["llama"], tmp_path / "base")
    _adapter_of(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"already quantized \(bitsandbytes\)"):
        merge(base, tmp_path / "adapter", tmp_path / "merged", "float32")


def test_merging_in_4_bit_would_lose_most_of_a_small_training(tmp_path: Path) -> None:
    """Why the base is loaded anew: PEFT's merge into an NF4 base does not carry a small update."""
    from sweeper.modeling.base_model import load_base

    settings = make_settings("quantization=nf4", "adapter.r=4")
    assert isinstance(settings.adapter, LoraAdapter)
    base = load_base(settings.model, settings.quantization, trained=False).model.eval()
    with torch.no_grad():
        untuned = base(IDS).logits
        model: PeftModel = attach(base, settings.adapter).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(1e-3 * torch.randn_like(weight))
        moved = model(IDS).logits - untuned
        merged = model.merge_and_unload()(IDS).logits - untuned
    assert (merged - moved).norm() > 0.5 * moved.norm()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Shapes that do not fit are named, not traced."""
    base, other = save(CONFIGS["llama"], tmp_path / "a"), save(CONFIGS["gpt2"], tmp_path / "b")
    _adapter_of(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter into"):
        merge(other, tmp_path / "adapter", tmp_path / "merged", "float32")
    with pytest.raises(ModelError, match="contains no adapter"):
        merge(base, other, tmp_path / "merged", "float32")


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    base = save(CONFIGS["llama"], tmp_path / "base")
    _adapter_of(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is in use"):
        merge(base, tmp_path / "adapter", base, "float32")
