"""The repeated blocks of an architecture: what is never split, so what is gathered whole from shares."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By name. Every class of transformers names the classes of its own (`_no_split_modules`)."""
    kinds = set(model._no_split_modules or ())
    return {
        name: module for name, module in model.named_modules() if type(module).__name__ in kinds
    }


def largest_gathered(model: PreTrainedModel) -> int:
    """Bytes of the largest block and of all that is in none (embeddings, head, last norm)."""
    sizes = [_bytes(block) for block in blocks(model).values()]
    return max(sizes, default=0) + _bytes(model) - sum(sizes)


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
