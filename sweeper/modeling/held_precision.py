"""The dtype in which a quantized base holds its weights that are not quantized.

Norms and biases are held in fp32, as PEFT's preparation for k-bit training does. Embedding and head are
held in the compute dtype: autocast rounds the head to it at every use anyway, and the embedding's rows
pass through a conversion to fp32. Both are exact, so losses keep every bit, and a third of the memory of
an 8B model in NF4 is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hold_frozen(model: PreTrainedModel, compute_dtype: torch.dtype, packed: set[int]) -> None:
    """Freeze a quantized base and convert its other weights to the dtypes in which they are held.

    Args:
        model: the base, with or without an adapter. Trainable weights of an adapter become fp32.
        compute_dtype: dtype of the forward pass, in which the base was loaded.
        packed: ids of the quantized weights, which stay as they are.
    """
    kept = set()
    if compute_dtype != torch.float32:
        for module in _plain_ends(model):
            kept.add(id(module.weight))
            if isinstance(module, nn.Embedding):
                # The stream of hidden states continues in fp32, as if the embedding were held in fp32
                module.register_forward_hook(_in_fp32)
            else:  # as autocast does, for callers without it
                module.register_forward_pre_hook(_in_own_dtype)
    for parameter in model.parameters():
        if id(parameter) not in packed | kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


def _plain_ends(model: PreTrainedModel) -> Iterator[nn.Embedding | nn.Linear]:
    """Yield the base's own embedding and head, if nothing but torch's plain layers computes with them.

    Gemma's embedding, for example, multiplies by a number that is rounded to the weight's dtype.
    """
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = [
        module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        for module in found
        if module is not None
    ]
    # Tied to each other, both have one weight, which then suits neither
    others = {id(end.weight) for end in ends if type(end) not in (nn.Embedding, nn.Linear)}
    for end in ends:
        if id(end.weight) not in others and not end.weight.requires_grad:
            yield end


def _in_fp32(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(torch.float32)


def _in_own_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    assert isinstance(module.weight, Tensor)
    return tuple(states.to(module.weight.dtype) for states in inputs)
