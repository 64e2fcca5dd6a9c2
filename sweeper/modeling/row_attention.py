"""Causal attention that is confined to the rows of a batch without padding.

Registered with transformers as an attention implementation. Without bounds of rows the attention is
transformers' own sdpa, so the same model also takes padded batches and generates answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sweeper.data.padding_free import ROW_ATTENTION, ROW_BOUNDS

WITHOUT_EFFECT = {
    *("position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("output_router_logits", "num_items_in_batch", "logits_to_keep"),
}
"""Arguments that transformers passes to every attention, and that no attention without a cache reads."""


class UnsupportedAttention(NotImplementedError):
    """A model's attention has a feature that row attention does not compute."""


def attend_in_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend from every token to the tokens of its row that are not after it.

    Args:
        module: The attention layer that calls.
        query: Queries [1, heads, tokens, size], the rows one after the other.
        key: Keys [1, key heads, tokens, size].
        value: Values [1, key heads, tokens, size].
        attention_mask: The batch's placeholder.
        options: The bounds of the rows, `scaling`, `sliding_window`, `is_causal` and `dropout`.

    Returns:
        The attended values [1, tokens, heads, size], and no weights.

    Raises:
        UnsupportedAttention: An option has an effect that is not computed here.
    """
    bounds = options.pop(ROW_BOUNDS, None)
    if bounds is None:
        # The placeholder mask of a batch without padding has arrived, but not the rows' bounds
        if attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
            raise UnsupportedAttention("its layers do not receive the bounds of the rows")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    scaling, window = options.pop("scaling", None), options.pop("sliding_window", None)
    _require_plain(module, attention_mask, options)
    lengths = bounds.diff().tolist()
    rows = zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    attended = [_attend(*row, scaling=scaling, window=window, grouped=grouped) for row in rows]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _require_plain(
    module: torch.nn.Module, attention_mask: Tensor | None, options: dict[str, Any]
) -> None:
    if attention_mask is None or attention_mask.numel() != 1:
        raise UnsupportedAttention("its layers make an attention mask of their own")
    if options.pop("dropout", 0.0):
        raise UnsupportedAttention("it drops attention weights at random (attention dropout)")
    causal = options.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedAttention("its attention is not causal")
    unknown = {name for name, given in options.items() if given is not None} - WITHOUT_EFFECT
    if unknown:
        raise UnsupportedAttention(f"its attention has {', '.join(sorted(unknown))}")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    grouped: bool,
) -> Tensor:
    length = query.shape[2]
    mask = (
        None if window is None or length <= window else _window_mask(length, window, query.device)
    )
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=grouped,
    )


def _window_mask(length: int, window: int, on: torch.device) -> Tensor:
    at = torch.arange(length, device=on)
    distance = at[:, None] - at
    return (distance >= 0) & (distance < window)


AttentionInterface.register(ROW_ATTENTION, attend_in_rows)
# transformers builds no mask for an attention without an entry here, and padded batches need one
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
