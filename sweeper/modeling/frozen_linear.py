"""Compute a LoRA layer on a frozen base in one autograd function, on CPUs.

PEFT computes y = x Wᵀ + s (x Aᵀ) Bᵀ in separate operations, which copy, scale and add the outputs of
all tokens. The function here adds in the matrix product itself, and its backward pass multiplies with
the merged weight W + s B A. Layers that compute anything else keep PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def fuse_frozen_linears(model: PeftModel) -> int:
    """Let the adapted linear layers of a model compute in one function, where that is the same.

    A layer is PEFT's in every other respect. Removing the adapter removes the change.

    Returns:
        The number of layers that compute in one function.
    """
    fused = [layer for layer in model.modules() if type(layer) in FUSED and _is_plain(layer)]
    for layer in fused:
        layer.__class__ = FUSED[type(layer)]
    return len(fused)


def unpacked_shapes(model: PeftModel, packed: Collection[int]) -> list[torch.Size]:
    """Return the shapes [outputs, inputs] of the weights that the backward pass may keep unpacked.

    Args:
        model: The model on the meta device.
        packed: Identities of the weights that are packed into four bits when the base is loaded.
    """
    plain = (layer for layer in model.modules() if type(layer) is LoraLinear)
    return [
        layer.base_layer.weight.shape
        for layer in plain
        if id(layer.base_layer.weight) in packed
        and type(layer.base_layer) is nn.Linear
        and (name := _only_adapter(layer)) is not None
        and isinstance(layer.lora_dropout[name], nn.Identity)
    ]


def is_kept(outputs: int, tokens: int) -> bool:
    """Return True if the backward pass keeps an unpacked weight, which is no larger than its inputs."""
    return outputs <= tokens


class FusedForward:
    """Forward pass of PEFT's linear layers, in one function if the layer is in its usual state."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, with PEFT's own forward in any other state than the usual one."""
        name = _only_adapter(self)
        if name is None or args or kwargs or not _computes_in(self, x, name):
            output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return output
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if torch.is_grad_enabled():
            # Models may change the output in place (Falcon does), which autograd refuses for views
            # that are made inside the function
            rows = x.reshape(-1, x.shape[-1])
            trained: Tensor = LoraProduct.apply(rows, down, up, self.scaling[name], self.base_layer)  # type: ignore[no-untyped-call]
            return trained.view(*x.shape[:-1], -1)
        return _judged_product(x, down, up, self.scaling[name], self.base_layer)


class FusedLinear(FusedForward, LoraLinear):  # type: ignore[misc]
    """Linear layer of PEFT on a dense weight."""


class FusedLinear4bit(FusedForward, LoraLinear4bit):  # type: ignore[misc]
    """Linear layer of PEFT on a weight of four bits."""


FUSED: dict[type, type] = {LoraLinear: FusedLinear, LoraLinear4bit: FusedLinear4bit}
"""Classes of PEFT, and those of the same layers in one function."""


class LoraProduct(torch.autograd.Function):
    """The sum of the products with a frozen weight and with its adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, scaling: float, base: nn.Linear
    ) -> Tensor:
        """Return x Wᵀ + bias + scaling (x downᵀ) upᵀ.

        Args:
            ctx: Values for the backward pass.
            x: Inputs [tokens, inputs].
            down: PEFT's A [rank, inputs].
            up: PEFT's B [outputs, rank].
            scaling: Factor of the adapter.
            base: The frozen layer.
        """
        weight = dense_weight(base)
        output = linear(x, weight, base.bias)
        inner = x @ down.t()
        output.addmm_(inner, up.t(), alpha=scaling)
        # A small unpacked weight is kept rather than unpacked twice. It takes no more memory than the
        # inputs, which are kept in any case. The memory estimate counts it (unpacked_shapes)
        kept = is_kept(weight.shape[0], x.shape[0])
        ctx.save_for_backward(x, inner, down, up, weight if kept else None)
        ctx.base, ctx.scaling = base, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, down and up."""
        x, inner, down, up, weight = ctx.saved_tensors
        of_inner = (gradient @ up).mul_(ctx.scaling)
        of_up = (gradient.t() @ inner).mul_(ctx.scaling)
        of_down = of_inner.t() @ x
        of_input = None
        if ctx.needs_input_grad[0]:
            weight = dense_weight(ctx.base) if weight is None else weight
            if _merging_pays(x, weight):
                of_input = gradient @ torch.addmm(weight, up, down, alpha=ctx.scaling)
            else:
                of_input = (gradient @ weight).addmm_(of_inner, down)
        return of_input, of_down, of_up, None, None


def dense_weight(base: nn.Linear) -> Tensor:
    """Return the weight [outputs, inputs] of a frozen layer, unpacked if it has four bits."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight.detach()
    unpacked: Tensor = dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state)
    return unpacked


def _judged_product(x: Tensor, down: Tensor, up: Tensor, scaling: float, base: nn.Linear) -> Tensor:
    """Return the output of a layer whose gradient is not needed."""
    weight = dense_weight(base)
    if _merging_pays(x, weight):
        return linear(x, torch.addmm(weight, up, down, alpha=scaling), base.bias)
    # Generation has few tokens at a time
    return linear(x, weight, base.bias) + linear(linear(x, down), up) * scaling


def _merging_pays(x: Tensor, weight: Tensor) -> bool:
    """Return True if merging an adapter costs less than multiplying all tokens with it."""
    outputs, inputs = weight.shape
    tokens = x.numel() // inputs
    # Both sides times the rank are multiplications: of the merge, and of the tokens
    return outputs * inputs < tokens * (outputs + inputs)


def _is_plain(layer: LoraLayer) -> bool:
    """Return True if a layer's base is a frozen linear weight on a CPU, and nothing changes its call."""
    base = layer.base_layer
    if type(base) not in (nn.Linear, bnb.nn.Linear4bit) or layer.fan_in_fan_out:
        return False
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    if hooked or base.weight.device.type != "cpu":
        return False
    if any(weight.requires_grad for weight in base.parameters()):
        return False
    if base.bias is not None and base.bias.dtype != _held_in(base):
        return False
    return type(base) is nn.Linear or _is_usual(base)


def _is_usual(base: bnb.nn.Linear4bit) -> bool:
    """Return True if unpacking the weight gives what bitsandbytes computes with."""
    state = base.weight.quant_state
    return (
        state is not None
        and tuple(state.shape) == (base.out_features, base.in_features)
        and state.dtype == base.compute_dtype
        and not base.support_avx512bf16_for_cpu  # else packed otherwise at its first judgement
    )


def _held_in(base: nn.Linear) -> torch.dtype:
    """Return the dtype of the weight as the layer multiplies with it."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight.dtype
    computed: torch.dtype = base.compute_dtype
    return computed


def _only_adapter(layer: Any) -> str | None:
    """Return the name of a layer's one active adapter, if it is plain LoRA and not merged."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
    return name if plain else None


def _computes_in(layer: Any, x: Tensor, name: str) -> bool:
    """Return True if everything is in one dtype, and the adapter gets the same inputs as the base."""
    dropout = layer.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    dtypes = {x.dtype, layer.lora_A[name].weight.dtype, layer.lora_B[name].weight.dtype}
    return (
        not drops
        and dtypes == {_held_in(layer.base_layer)}
        and not torch.is_autocast_enabled("cpu")
    )
