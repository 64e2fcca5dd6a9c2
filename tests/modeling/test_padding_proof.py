"""Batches without padding give the losses and gradients of padded ones, or are refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from sweeper.data.packing import pack
from sweeper.data.padding_free import (
    ROW_ATTENTION,
    ROW_BOUNDS,
    PaddingFreeCollator,
    batch_collator,
)
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.evaluation.token_loss import evaluate_examples, target_nll
from sweeper.modeling.padding_proof import confine_to_rows, padding_obstacle, prove
from sweeper.modeling.reduced_model import reduced
from sweeper.modeling.row_attention import UnsupportedAttention, attend_in_rows

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "a window of 32": MistralConfig(**SMALL, sliding_window=32),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, attn_pdrop=0.0
    ),
}
LENGTHS = (7, 24, 100)
"""Tokens of rows below, near and far above a window of 32."""


def _rows(*lengths: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [IGNORED, IGNORED, *row[2:]]} for row in ids]


def _model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    tokens = (batch["labels"] != IGNORED).sum()
    loss = target_nll(model, batch, chunk_size=16) / tokens
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def _difference(model: Any, rows: list[Tokens], batch: dict[str, torch.Tensor]) -> list[float]:
    """Return the relative differences of the loss and of all gradients from padded single rows."""
    model.set_attn_implementation("sdpa")
    loss, gradients = _step(model, PaddingCollator(0)(rows))
    confine_to_rows(model)
    other, others = _step(model, batch)
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    norms = [
        float((others[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
        for name, gradient in gradients.items()
    ]
    return [abs(other - loss) / loss, max(norms)]


def _mostly_slow(names: Iterable[str], fast: set[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", _mostly_slow(CONFIGS, {"a window of 32"}))
def test_gradients_without_padding_are_those_of_padded_batches(name: str, recomputed: bool) -> None:
    """To 1e-10 in float64, also with recomputed activations and rows longer than a window."""
    model = _model(CONFIGS[name], torch.float64).eval()
    if recomputed:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train().activation_checkpointing_enable({"use_reentrant": False})
    rows = _rows(*LENGTHS)
    assert max(_difference(model, rows, PaddingFreeCollator()(rows))) <= 1e-10


def test_float32_differs_by_rounding_only() -> None:
    """The loss to 1e-6 and each gradient's norm to 2e-6."""
    model, rows = _model(CONFIGS["llama"], torch.float32).eval(), _rows(*LENGTHS, 5, 60)
    loss, gradients = _difference(model, rows, PaddingFreeCollator()(rows))
    assert loss <= 1e-6
    assert gradients <= 2e-6


def test_packs_are_trained_as_their_rows() -> None:
    """A batch of packs without padding has the gradient of the rows that the packs were made from."""
    model, rows = _model(CONFIGS["llama"], torch.float64).eval(), _rows(9, 17, 4, 12, 3)
    batch = PaddingFreeCollator()(pack(rows, 30))
    assert len(batch[ROW_BOUNDS]) == len(rows) + 1
    assert max(_difference(model, rows, batch)) <= 1e-10


def test_losses_of_single_examples_are_the_same() -> None:
    """Judging finds each row's loss, in the order of the rows, whatever their batches look like."""
    model, rows = _model(CONFIGS["llama"], torch.float64), _rows(24, 7, 100, 5, 33)
    padded = evaluate_examples(model, rows, batch_collator(model, 0), 2)
    confine_to_rows(model)
    collator = batch_collator(model, 0)
    assert isinstance(collator, PaddingFreeCollator)
    found = evaluate_examples(model, rows, collator, 2)
    assert [one.tokens for one in found] == [one.tokens for one in padded]
    assert [one.nll for one in found] == pytest.approx([one.nll for one in padded], rel=1e-12)


def test_padded_batches_and_generation_are_unchanged() -> None:
    """A model that is confined to rows gives the same bits for padded batches and generated answers."""
    model = _model(CONFIGS["a window of 32"], torch.float32).eval()
    batch = PaddingCollator(0)(_rows(7, 40))
    prompt = torch.tensor(_rows(12)[0]["input_ids"])[None]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return [logits, model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)]

    logits, answer = outputs()
    confine_to_rows(model)
    logits_in_rows, answer_in_rows = outputs()
    assert torch.equal(logits, logits_in_rows)
    assert torch.equal(answer, answer_in_rows)


FULL_SIZE = "a window at full size"
PROVEN = {
    **CONFIGS,
    "mixture of experts": Qwen3MoeConfig(**SMALL, head_dim=16, moe_intermediate_size=16),
    FULL_SIZE: MistralConfig(),
}


@pytest.mark.parametrize("name", _mostly_slow(PROVEN, {"a window of 32", "mixture of experts"}))
def test_proof_accepts_what_is_exact(name: str) -> None:
    """The proof accepts these models, and the proof at load changes no random state."""
    before = torch.get_rng_state()
    model = _model(PROVEN[name], torch.float32) if PROVEN[name].hidden_size == 32 else None
    torch.set_rng_state(before)
    assert prove(PROVEN[name]) is None if model is None else padding_obstacle(model) is None
    if model is not None:
        assert torch.equal(before, torch.get_rng_state())


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "state space": (
        MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2),
        "mamba",
    ),
    "no sdpa": (
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
        "bloom: transformers has no sdpa attention",
    ),
    "no bounds": (StableLmConfig(**SMALL), "do not receive the bounds"),
    "attention dropout": (LlamaConfig(**SMALL, attention_dropout=0.1), "attention dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_proof_refuses_what_is_not_exact(name: str) -> None:
    """A model that would mix rows, or whose attention is not computed, gets a reason."""
    config, words = REFUSED[name]
    assert words in str(prove(config))


def test_proof_finds_a_window_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an attention that ignores windows, the proof fails for a window far above its rows."""
    from transformers import AttentionInterface

    def blind(*arguments: Any, **options: Any) -> Any:
        return attend_in_rows(*arguments, **{**options, "sliding_window": None})

    monkeypatch.setitem(AttentionInterface._global_mapping, ROW_ATTENTION, blind)
    assert "not independent" in str(prove(MistralConfig(**SMALL, sliding_window=64)))
    assert prove(LlamaConfig(**SMALL)) is None


def test_small_model_has_every_kind_of_layer() -> None:
    """The shortest prefix with all kinds of layers is kept, and every window is short."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Qwen3Config(
        num_hidden_layers=12, layer_types=kinds * 3, use_sliding_window=True, sliding_window=4096
    )
    small = reduced(config)
    assert (small.layer_types, small.sliding_window) == (kinds, 8)
    assert config.num_hidden_layers == 12, "the model's own configuration is unchanged"


OPTIONS: dict[str, Any] = {
    "softcap": 30.0,
    "s_aux": torch.zeros(1),
    "position_bias": torch.zeros(1),
    "dropout": 0.1,
    "is_causal": False,
    "an_option_of_tomorrow": True,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_attention_refuses_an_option_that_it_does_not_compute(option: str) -> None:
    """Every option with an effect raises, also one that no version of transformers has yet."""
    batch = PaddingFreeCollator()(_rows(3, 5))
    parts = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    given = {ROW_BOUNDS: batch[ROW_BOUNDS], option: OPTIONS[option]}
    with pytest.raises(UnsupportedAttention):
        attend_in_rows(torch.nn.Identity(), *parts, batch["attention_mask"], **given)
