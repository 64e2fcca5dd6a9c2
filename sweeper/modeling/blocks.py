"""Find the repeated blocks of an architecture, which sharded training gathers one at a time."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the blocks of a model by module name."""
    # Every model class of transformers lists the classes of its blocks, for device maps
    kinds = set(model._no_split_modules or ())
    return {
        name: module for name, module in model.named_modules() if type(module).__name__ in kinds
    }


def largest_gathered(model: PreTrainedModel) -> int:
    """Return the bytes of the largest block plus all weights outside blocks (embeddings, head, norm)."""
    sizes = [_bytes(block) for block in blocks(model).values()]
    return max(sizes, default=0) + _bytes(model) - sum(sizes)


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
