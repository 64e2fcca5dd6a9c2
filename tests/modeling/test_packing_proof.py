"""Packing is proven on losses and gradients of rows that are longer than every attention window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import transformers.models.mistral.modeling_mistral as mistral
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sweeper.core.errors import ModelError
from sweeper.data.packing import PackedCollator, pack
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.modeling.packing_proof import _require_equal_logits, require_isolation
from sweeper.modeling.padding_proof import confine_to_rows
from sweeper.modeling.row_attention import UnsupportedAttention

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WINDOW = 32
WINDOWED = MistralConfig(**SMALL, sliding_window=WINDOW)
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "a window of 32": WINDOWED,
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "mixture of experts": Qwen3MoeConfig(**SMALL, head_dim=16, moe_intermediate_size=16),
}
FAST = {("a window of 32", "sdpa"), ("llama", "eager")}
PROVEN = [(name, attention) for name in CONFIGS for attention in ("sdpa", "eager")]


def _model(config: PretrainedConfig, attention: str = "sdpa", dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    config._experts_implementation = "eager"  # the other kernels have no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "attention"),
    [pytest.param(*o, marks=() if o in FAST else pytest.mark.slow) for o in PROVEN],
)
def test_proof_accepts_what_is_exact(name: str, attention: str) -> None:
    """These classes keep packed rows apart, and the proof changes neither model nor random state."""
    model = _model(CONFIGS[name], attention).train()
    before = torch.get_rng_state()
    require_isolation(model)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


REFUSED: dict[str, PretrainedConfig] = {
    "MambaForCausalLM": MambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2
    ),
    "BloomForCausalLM": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_keep_packed_rows_apart_is_refused(name: str) -> None:
    """A state-space model and one that masks by itself: refused by name, with the way out."""
    model = _model(REFUSED[name], "eager")
    with pytest.raises(ModelError, match=rf"{name}.*data\.packing=false"):
        require_isolation(model)


def _ignore_windows_in_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = mistral.create_sliding_window_causal_mask

    def blind(**options: Any) -> Any:
        packed = options["attention_mask"] is None
        return mistral.create_causal_mask(**options) if packed else windowed(**options)

    monkeypatch.setattr(mistral, "create_sliding_window_causal_mask", blind)


def test_packs_that_ignore_a_window_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows below the window are exact, longer ones far off: the proof's rows exceed every window."""
    _ignore_windows_in_packs(monkeypatch)
    model = _model(WINDOWED, dtype=torch.float64)
    assert max(_difference(model, _rows(5, 9))) <= 1e-10
    assert max(_difference(model, _rows(7, 24, 100))) > 0.1
    with pytest.raises(ModelError, match="not independent"):
        require_isolation(model)


def test_packs_that_mix_in_the_recomputation_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that holds for the first computation of a layer only shows with recomputed activations."""
    used: list[tuple[Any, Any]] = []

    def forgetful(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> Any:
        again = any(one is module and mask is attention_mask for one, mask in used)
        used.append((module, attention_mask))
        mask = None if again else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", forgetful)
    with pytest.raises(ModelError, match="CheckpointError"):
        require_isolation(_model(CONFIGS["llama"]))


def test_a_model_without_padding_was_proven_when_it_was_loaded() -> None:
    """Its packs are taken apart, so there is nothing left to prove."""
    model = _model(CONFIGS["llama"])
    confine_to_rows(model)
    require_isolation(model)


def test_logits_alone_show_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is proven by logits in bfloat16, here by those of a class with a short window."""
    config = MistralConfig(**SMALL, sliding_window=8)
    _require_equal_logits(_model(config, dtype=torch.bfloat16))
    _ignore_windows_in_packs(monkeypatch)
    with pytest.raises(UnsupportedAttention, match="not independent"):
        _require_equal_logits(_model(config, dtype=torch.bfloat16))


def _pretend_flash(monkeypatch: pytest.MonkeyPatch, leaks: bool) -> list[torch.dtype]:
    """Register an attention that has no float32, as flash attention, and return the dtypes it got."""
    seen: list[torch.dtype] = []

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> Any:
        seen.append(query.dtype)
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        mask = None if leaks else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    # transformers looks for a kernel behind every name that has "flash" in it
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", lambda *_: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, "pretended_flash", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "pretended_flash", sdpa_mask)
    return seen


def test_flash_attention_is_proven_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base held in float32 is proven in a dtype that the kernels have, and a leak is refused."""
    seen = _pretend_flash(monkeypatch, leaks=False)
    model = _model(CONFIGS["llama"], "pretended_flash")
    require_isolation(model)
    assert set(seen) == {torch.bfloat16}
    _pretend_flash(monkeypatch, leaks=True)
    with pytest.raises(ModelError, match="not independent"):
        require_isolation(model)


def _rows(*lengths: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [IGNORED, IGNORED, *row[2:]]} for row in ids]


def _step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = cross_entropy(logits, batch["labels"][:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def _difference(model: Any, rows: list[Tokens]) -> list[float]:
    """Return the relative differences of the loss and of all gradients of packs from padded rows."""
    model.eval()
    loss, gradients = _step(model, PaddingCollator(0)(rows))
    other, others = _step(model, PackedCollator(0)(pack(rows, 108)))
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    norms = [
        float((others[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
        for name, gradient in gradients.items()
    ]
    return [abs(other - loss) / loss, max(norms)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "llama" else pytest.mark.slow) for n in CONFIGS]
)
def test_packs_differ_by_rounding_only(name: str) -> None:
    """To 1e-10 in float64. In float32 the loss to 1e-6 and each gradient's norm to 2e-6."""
    rows = _rows(7, 24, 100, 5, 60)
    exact = 1e-10 if name not in {"gemma"} else 2e-6  # Gemma's norms are in float32
    assert max(_difference(_model(CONFIGS[name], dtype=torch.float64), rows)) <= exact
    if name != "mixture of experts":  # rounding in float32 may choose another expert
        loss, gradients = _difference(_model(CONFIGS[name]), rows)
        assert loss <= 1e-6
        assert gradients <= 2e-6


@pytest.mark.slow
def test_experts_are_chosen_alike_in_packs() -> None:
    """In float64 each token of a pack goes to the experts that it goes to in a padded row."""
    model, rows = _model(CONFIGS["mixture of experts"], dtype=torch.float64), _rows(7, 24, 100)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, found: chosen.append(found[2]))
    padded, packs = PaddingCollator(0)(rows), PackedCollator(0)(pack(rows, 200))
    _step(model, padded)
    real = padded["attention_mask"].flatten().bool()
    expected = [found[real] for found in chosen]
    chosen.clear()
    _step(model, packs)
    assert len(expected) == len(chosen) == SMALL["num_hidden_layers"]
    assert all(torch.equal(a, b) for a, b in zip(expected, chosen, strict=True))
