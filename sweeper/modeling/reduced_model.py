"""Make a small model of the same class as a large one, with every kind of its layers.

Knows transformers' names for sizes, and nothing of what the small model is for.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers import AutoModelForCausalLM

from sweeper.modeling.row_attention import UnsupportedAttention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WINDOW = 8
"""Tokens of an attention window in the small model."""
VOCABULARY = 64
LARGEST_WEIGHTS = 30_000_000
"""Weights above which a small model is too expensive for a proof."""
SMALLER = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    # The layers before the first one with experts are no list: DeepSeek-V3 has 3 of them
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "vocab_size": VOCABULARY,
}
"""Upper limits of sizes in the small model, by names of transformers' configurations."""


def small_model(
    config: PretrainedConfig, attention: str = "sdpa", dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """Return a model of the same class on the CPU, with few and narrow layers of every kind.

    Args:
        config: Configuration of the model at its full size.
        attention: Attention implementation of the small model.
        dtype: Dtype of its weights.

    Raises:
        UnsupportedAttention: The class does not have this attention.
        ValueError: The small model is too large.
    """
    small = reduced(config)
    # The kernels for several experts at a time have no float64
    small._experts_implementation = "eager"
    with torch.device("meta"):
        shapes: PreTrainedModel = AutoModelForCausalLM.from_config(small)
    if attention == "sdpa" and not shapes._supports_sdpa:
        raise UnsupportedAttention("transformers has no sdpa attention for this class")
    weights = sum(p.numel() for p in shapes.parameters())
    if weights > LARGEST_WEIGHTS:
        raise ValueError(f"its smallest form has {weights:,} weights")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small, dtype=dtype, attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Fresh weights hardly attend, and some are zero, so that a leak between rows would not show
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(noise, alpha=0.1)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0."""
    # Dropout draws other masks for another shape. Outside of attention it acts on each token alone
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or isinstance(module, torch.nn.Dropout)
            ):
                setattr(module, name, 0.0)


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
    # torch's Embedding refuses a padding_idx beyond the small vocabulary
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
    # Without this key every head has keys of its own
    keys = getattr(small, "num_key_value_heads", None) or heads
    size = small.hidden_size // heads
    kept, kept_keys = (2, 2) if keys == heads else (2, 1) if keys == 1 else (4, 2)
    small.num_attention_heads = kept
    if getattr(small, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = kept_keys
    small.hidden_size = kept * size
    # The width of OPT's embeddings, which it projects where it is another one
    if getattr(small, "word_embed_proj_dim", None) is not None:
        small.word_embed_proj_dim = small.hidden_size
