"""Experts and linear layers with a class of their own are quantized and adapted, and adapters travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import (
    attach,
    count_parameters,
    describe_reach,
    detach,
    load_adapter,
    modules_without_gradient,
)
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.expert_weights import quantized_share
from sweeper.modeling.memory_estimate import estimate
from sweeper.modeling.step_memory import StepWorkload
from tests.conftest import make_settings
from tests.modeling.models import on_meta, save

SIZE = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2}
# Equal sides, so that weights in another place would fit there
EXPERTS = {"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
SHARED = {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**GROUPED, intermediate_size=64, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SHARED),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4, head_dim=16),
    "qwen3_next": Qwen3NextConfig(
        **SHARED,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gpt_oss": GptOssConfig(
        **GROUPED, intermediate_size=64, num_local_experts=4, head_dim=16, pad_token_id=0
    ),
    "deepseek_v3": DeepseekV3Config(
        **SIZE,
        **EXPERTS,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "falcon": FalconConfig(**SIZE),
    "lfm2": Lfm2Config(**GROUPED, intermediate_size=64, layer_types=["conv", "full_attention"]),
}
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
STACKED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED_EXPERT = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
DELTA = {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
FALCON = {"self_attention.query_key_value", "self_attention.dense"}
DENSE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED_EXPERTS = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
LFM2 = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
ROLES: dict[str, tuple[set[str], set[str], set[str]]] = {
    # attention, mlp, and what all-linear adds to them
    "mixtral": (ATTENTION, STACKED, set()),
    "qwen2_moe": (ATTENTION, STACKED | SHARED_EXPERT, set()),
    "qwen3_moe": (ATTENTION, STACKED, set()),
    "qwen3_next": (ATTENTION | DELTA, STACKED | SHARED_EXPERT, set()),
    "gpt_oss": (ATTENTION, STACKED, set()),
    "deepseek_v3": (
        {f"self_attn.{name}" for name in LATENT},
        STACKED | DENSE | SHARED_EXPERTS,
        set(),
    ),
    "falcon": (FALCON, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}, set()),
    "lfm2": (LFM2, {f"feed_forward.w{n}" for n in (1, 2, 3)}, {"conv.in_proj", "conv.out_proj"}),
}
FAST = ("qwen2_moe",)
BY_NAME = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in CONFIGS
]


def _adapter(*overrides: str) -> LoraAdapter:
    adapter = make_settings(*overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    return adapter


def _load(folder: Path, kind: str) -> LoadedBase:
    settings = make_settings(f"model.base_model={folder}", f"quantization={kind}")
    return load_base(settings.model, settings.quantization, trained=False)


def _targets(model: PeftModel) -> set[str]:
    """What carries an adapter, below its layer: modules, and stacked weights by their own name."""
    found = set()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        plain = name.replace(".base_layer", "")
        below = plain.split("layers.")[-1].split(".h.")[-1].split(".", 1)[1]
        weight = getattr(module, "parameter_name", None)
        found.add(f"{below}.{weight}" if weight else below)
    return found


@pytest.mark.parametrize("name", BY_NAME)
def test_presets_follow_the_role_in_the_block(name: str) -> None:
    """Experts are per-token work, delta nets attention, routers neither; all layers are all of them."""
    attention, mlp, more = ROLES[name]
    expected = {
        "attention": attention,
        "mlp": mlp,
        "all-linear": attention | mlp | more,
    }
    for preset, wanted in expected.items():
        text = f"adapter.target_modules={preset}"
        assert _targets(attach(on_meta(CONFIGS[name]), _adapter(text))) == wanted, preset
        whole = attach(on_meta(CONFIGS[name]), _adapter(text, "adapter.layers_to_transform=0-1"))
        assert _targets(whole) == wanted, preset
    assert expected["mlp"] != expected["attention"]


def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _disturb(model: PeftModel) -> None:
    """Give every update a value of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_linear_weight_is_quantized_and_every_adapter_trained(
    name: str, tmp_path: Path
) -> None:
    """The share is the whole; the backward pass reaches every module; the base stays as it is."""
    base = _load(save(CONFIGS[name], tmp_path / "base"), "nf4")
    assert base.quantized_share == 1.0
    before = _logits(base.model)
    whole = count_parameters(base.model).total
    assert whole == sum(weight.numel() for weight in on_meta(CONFIGS[name]).parameters())
    model = attach(base.model, _adapter())
    assert torch.equal(_logits(model), before)
    _logits(model.train()).float().square().mean().backward()
    assert not modules_without_gradient(model)
    _disturb(model)
    once, again = _logits(model), _logits(model)
    assert torch.equal(once, again), "an update is left on the weight after a forward pass"
    assert not torch.equal(once, before)
    assert torch.equal(_logits(detach(model)), before)


@pytest.mark.parametrize("name", BY_NAME)
def test_an_adapter_of_a_quantized_base_is_the_same_on_its_own_base_and_in_plain_peft(
    name: str, tmp_path: Path
) -> None:
    """Stored and loaded, the logits are equal; plain PEFT finds every weight in the same place."""
    base = _load(save(CONFIGS[name], tmp_path / "base"), "nf4")
    model = attach(base.model, _adapter())
    _disturb(model)
    expected = _logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(detach(model), tmp_path / "adapter")
    assert torch.equal(_logits(again), expected)
    weights = {key: value for key, value in again.state_dict().items() if "lora_" in key}
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).state_dict()
    found = {key: value for key, value in theirs.items() if "lora_" in key}
    assert found.keys() == weights.keys()
    assert weights
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_what_8_bits_leave_out_is_said(tmp_path: Path) -> None:
    """bitsandbytes has no 8-bit form of stacked weights, so the share is below one."""
    base = _load(save(CONFIGS["mixtral"], tmp_path / "base"), "int8")
    assert base.quantized_share == pytest.approx(24_576 / (24_576 + 98_304), abs=0.001)
    assert any(
        "int8 quantizes 20.0% of the linear weights" in remark and "experts.gate_up_proj" in remark
        for remark in base.remarks
    )


def test_a_base_of_which_nothing_is_quantized_is_refused() -> None:
    """It would be called QLoRA and be none."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, intermediate_size=64))
    with pytest.raises(ModelError, match=r"quantization=nf4 quantizes none.*Set quantization=none"):
        quantized_share(model, "here", "nf4")
    layer = model.model.layers[0].mlp
    layer.up_proj = bnb.nn.Linear4bit(64, 64)
    assert 0 < quantized_share(model, "here", "nf4").share < 1


@pytest.mark.parametrize(
    "override",
    ["adapter.lora_dropout=0.1", "adapter.use_dora=true", "adapter.init_lora_weights=olora"],
)
def test_what_experts_do_not_allow_is_refused_before_training(override: str) -> None:
    """The message names the option, and a preset without experts."""
    with pytest.raises(ModelError, match=r"experts.*adapter\.target_modules=attention"):
        attach(on_meta(CONFIGS["mixtral"]), _adapter(override))
    whole = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    attach(whole, _adapter(override, "adapter.target_modules=attention"))


def test_what_an_adapter_reaches_is_counted() -> None:
    """By kind, with what is left."""
    model = attach(on_meta(CONFIGS["qwen3_moe"]), _adapter("adapter.target_modules=attention"))
    assert describe_reach(model) == (
        "on q_proj ×2, k_proj ×2, v_proj ×2, o_proj ×2; not on gate_up_proj ×2, down_proj ×2"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_the_memory_of_a_mixture_of_experts_is_estimated_on_a_cpu(name: str, kind: str) -> None:
    """Experts are packed in 4 bits, and their step is simulated without values."""
    settings = make_settings(f"quantization={kind}")
    found = estimate(
        CONFIGS[name],
        settings.adapter,
        settings.quantization,
        StepWorkload(2, 16, False, False, "adamw_torch", None, None, 1),
        compute_dtype=torch.float32,
        attn_implementation=None,
        on=torch.device("cpu"),
    )
    numel = sum(weight.numel() for weight in on_meta(CONFIGS[name]).parameters())
    assert found.weights * 2**20 < (4 if kind == "none" else 3) * numel + 4096
    assert found.activations > 0
