"""Prove that a model computes batches without padding as it computes padded ones, or say why not.

The proof trains a small model of the same class for one step in float64, with and without recomputed
activations, on rows that are longer than its attention windows. Loss and gradients must be equal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sweeper.data.padding_free import ROW_ATTENTION, PaddingFreeCollator
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.modeling.row_attention import UnsupportedAttention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-10
"""Largest relative difference of the loss, and of each gradient in its L2 norm, in float64."""
ROUNDING = 10.0
"""Multiple of the difference that the order of the rows makes in padded batches, if that is larger."""
# Some classes compute their norms in float32 whatever the dtype of the model (Gemma, Cohere, Helium)
LARGEST_ROUNDING = 2e-6
"""Relative difference that rounding in float32 explains at most."""
NEGLIGIBLE = 1e-6
"""Share of the largest gradient below which a gradient counts as zero. Biases of keys have none."""
WINDOW = 8
"""Tokens of an attention window in the small model."""
ROW_LENGTHS = (3, 20, 11)
"""Tokens of the rows in the proof: below, far above and slightly above the window."""
VOCABULARY = 64
LARGEST_WEIGHTS = 30_000_000
"""Weights above which a small model is too expensive for a proof."""
SMALLER = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts"), 2),
    "vocab_size": VOCABULARY,
}
"""Upper limits of sizes in the small model, by names of transformers' configurations."""
TrainingStep = tuple[Tensor, Mapping[str, Tensor]]
"""The loss of a step, and its gradients by parameter."""

_proven: dict[tuple[type, str], str | None] = {}
"""Results of this process, by class and configuration."""


def padding_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a loaded model needs padded batches, or None if the proof succeeds.

    Later calls with the same configuration return the first result. torch's random state is unchanged.
    """
    obstacle = _configured_obstacle(model)
    if obstacle is not None:
        return obstacle
    key = (type(model), model.config.to_json_string())
    if key not in _proven:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            _proven[key] = prove(model.config)
    return _proven[key]


def _configured_obstacle(model: PreTrainedModel) -> str | None:
    # The other path has been measured on CPUs only
    if model.device.type != "cpu":
        return f"batches on a device of type {model.device.type} are padded"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    # bitsandbytes decides over a whole batch which columns have outliers, so padding changes them
    if getattr(model, "is_loaded_in_8bit", False):
        return "its 8-bit layers treat outliers of a whole batch alike"
    return None


def prove(config: PretrainedConfig) -> str | None:
    """Return None if a small model of this configuration is exact without padding, else the reason.

    Args:
        config: Configuration of the model at its full size.
    """
    try:
        model = _small_model(config)
        _require_equal(model)
    except UnsupportedAttention as reason:
        return f"{_class_name(config)}: {reason}"
    except Exception as error:  # noqa: BLE001 - a class can fail in any way, padded batches work
        first = str(error).partition("\n")[0].partition(". ")[0]
        return f"no proof for {_class_name(config)}: {type(error).__name__}: {first}"
    return None


def _class_name(config: PretrainedConfig) -> str:
    return str((config.architectures or [config.model_type])[0])


def _require_equal(model: PreTrainedModel) -> None:
    """Compare the model's losses and gradients with those of padded batches.

    Raises:
        UnsupportedAttention: They differ, or the model's attention cannot be confined to rows.
    """
    rows = _rows()
    flat, padded = PaddingFreeCollator()(rows), PaddingCollator(0)(rows)
    model.train()
    with _row_attention(model), torch.no_grad():
        model(**_inputs(flat), use_cache=False)  # raises if attention weights are dropped at random
    _disable_dropout(model)
    expected = _step(model, padded)
    reordered = _step(model, PaddingCollator(0)(rows[::-1]))
    rounding = min(ROUNDING * _difference(expected, reordered), LARGEST_ROUNDING)
    limit = max(TOLERANCE, rounding)
    with _row_attention(model):
        _compare(expected, _step(model, flat), limit, "")
        # Answers are generated from padded batches by the same model
        _compare(expected, _step(model, padded), limit, "in padded batches ")
        if model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            _compare(expected, _step(model, flat), limit, "with recomputed activations ")


@contextmanager
def _row_attention(model: PreTrainedModel) -> Iterator[None]:
    confine_to_rows(model)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def confine_to_rows(model: PreTrainedModel) -> None:
    """Let a model take batches without padding. Padded batches and generation stay possible.

    Raises:
        UnsupportedAttention: transformers cannot replace the attention of this class.
    """
    model.set_attn_implementation(ROW_ATTENTION)
    if model.config._attn_implementation != ROW_ATTENTION:
        raise UnsupportedAttention("transformers cannot replace its attention")


def _step(model: PreTrainedModel, batch: dict[str, Tensor]) -> TrainingStep:
    """Return the loss of one step and the gradients by parameter."""
    model.zero_grad()
    # The padded loss is computed here from the whole logits, independently of the product's loss
    logits = model(**_inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = cross_entropy(logits.double(), batch["labels"][:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    named = model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def _compare(expected: TrainingStep, found: TrainingStep, limit: float, how: str) -> None:
    worst = _difference(expected, found)
    if not worst <= limit:  # also if it is not a number
        raise UnsupportedAttention(
            f"its rows are not independent {how}(relative error {worst:.1e})"
        )


def _difference(expected: TrainingStep, found: TrainingStep) -> float:
    """Return the largest relative difference of two steps: of the loss, or of a gradient's L2 norm."""
    (loss, gradients), (other, others) = expected, found
    assert gradients.keys() == others.keys(), "other weights get a gradient"
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    least = NEGLIGIBLE * max(norms.values())
    parts = [
        float((others[name] - gradients[name]).norm()) / max(norm, least)
        for name, norm in norms.items()
    ]
    # torch's maximum of values that include NaN is NaN
    return float(torch.tensor([float((other - loss).abs() / loss), *parts]).max())


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in batch.items() if name != "labels"}


def _rows() -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in ROW_LENGTHS]
    return [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]


def _disable_dropout(model: torch.nn.Module) -> None:
    # Dropout draws other masks for another shape. Outside of attention it acts on each token alone
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or isinstance(module, torch.nn.Dropout)
            ):
                setattr(module, name, 0.0)


def _small_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of the same class in float64, with few and narrow layers of every kind."""
    small = reduced(config)
    # The kernels for several experts at a time have no float64
    small._experts_implementation = "eager"
    with torch.device("meta"):
        shapes: PreTrainedModel = AutoModelForCausalLM.from_config(small)
    if not shapes._supports_sdpa:
        raise UnsupportedAttention("transformers has no sdpa attention for this class")
    weights = sum(p.numel() for p in shapes.parameters())
    if weights > LARGEST_WEIGHTS:
        raise ValueError(f"its smallest form has {weights:,} weights")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small, dtype=torch.float64, attn_implementation="sdpa"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Fresh weights hardly attend, and some are zero, so that a leak between rows would not show
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(noise, alpha=0.1)
    return model


def reduced(config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration with narrow layers, one of every kind, and short attention windows."""
    small = copy.deepcopy(config)
    # A stored quantization concerns linear layers, not attention
    small.__dict__.pop("quantization_config", None)
    _reduce_layers(small)
    _reduce_heads(small)
    for name, limit in SMALLER.items():
        if _is_number(found := getattr(small, name, None)):
            setattr(small, name, min(found, limit))
    for name, found in list(vars(small).items()):
        if ("window" in name or name == "attention_chunk_size") and _is_number(found):
            setattr(small, name, min(found, WINDOW))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    return small


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _reduce_layers(small: PretrainedConfig) -> None:
    """Keep the first layers, down to the shortest prefix that has every kind of layer."""
    depth = small.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(small).items()
        if isinstance(value, list) and len(value) == depth
    }
    kinds = list(zip(*map(_hashable, lists.values()), strict=True)) or [()] * depth
    first = max(kinds.index(kind) for kind in set(kinds))
    kept = min(depth, max(2, first + 1))
    for name, value in lists.items():
        setattr(small, name, value[:kept])
    small.num_hidden_layers = kept


def _hashable(values: list[Any]) -> list[str]:
    return [str(value) for value in values]


def _reduce_heads(small: PretrainedConfig) -> None:
    """Reduce the number of heads, with their size and the kind of grouping unchanged."""
    heads = small.num_attention_heads
    keys = getattr(small, "num_key_value_heads", None) or heads
    size = small.hidden_size // heads
    kept, kept_keys = (2, 2) if keys == heads else (2, 1) if keys == 1 else (4, 2)
    small.num_attention_heads = kept
    if getattr(small, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = kept_keys
    small.hidden_size = kept * size
    if getattr(small, "word_embed_proj_dim", None) is not None:
        small.word_embed_proj_dim = small.hidden_size
