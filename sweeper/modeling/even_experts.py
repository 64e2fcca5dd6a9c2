"""Compute experts on shapes alone, as if every expert got equally many tokens.

transformers' own implementations ask which tokens an expert gets, or allow bfloat16 only, where tensors
have no values. The sizes of the tensors are those of its grouped implementation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "even"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of experts in transformers' configurations."""


def even_experts(config: PretrainedConfig) -> dict[str, str]:
    """Return the option that chooses this implementation for a class with experts, or {}."""
    text = config.get_text_config()
    counted = any(getattr(text, name, None) for name in COUNTS)
    return {"experts_implementation": NAME} if counted else {}


def _forward(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the chosen experts' results, with tokens dealt out in turn.

    Args:
        experts: transformers' module with the stacked weights.
        hidden: [tokens, width].
        chosen: experts of each token, [tokens, experts per token].
        weights: weights of these experts, of the same shape.
    """
    tokens, each = chosen.shape
    share = math.ceil(tokens * each / experts.num_experts)
    dealt = hidden.repeat_interleave(each, dim=0)
    padding = share * experts.num_experts - dealt.shape[0]
    groups = torch.nn.functional.pad(dealt, (0, 0, 0, padding)).view(experts.num_experts, share, -1)
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    inner = _product(experts, groups, first)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    result = _product(experts, inner, experts.down_proj).flatten(0, 1)[: tokens * each]
    return (result * weights.reshape(-1, 1)).view(tokens, each, -1).sum(dim=1).to(hidden.dtype)


def _product(experts: Any, groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(groups, weight if experts.is_transposed else weight.transpose(1, 2))


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
