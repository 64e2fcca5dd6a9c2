"""Find and quantize linear weights that bitsandbytes' replacement of `nn.Linear` does not reach.

Those are stacked weights of experts (one tensor for all experts of a layer) and linear layers with a
class of their own (Falcon). transformers' quantizers are extended for the duration of a load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, _register_parametrization_hooks
from torch.nn.utils import parametrize
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from sweeper.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IN_ORDER = "stacked_weights_in_order"
"""Attribute of a module with packed weights: their names in the order of the class's definition."""
EXPERTS = "Experts"
"""Part of the names of transformers' classes that hold the stacked weights of experts."""
SHOWN = 4
"""Kinds of weights that a remark names."""


def expert_weights(model: torch.nn.Module) -> list[str]:
    """Return the full names of the stacked weights of experts, quantized or not."""
    return [
        # PEFT adds this part to the names of what it wraps
        f"{path}.{name}".replace(".base_layer", "")
        for path, module in model.named_modules()
        if EXPERTS in type(module).__name__
        for name in _stacked(module)
    ]


def _stacked(module: torch.nn.Module) -> list[str]:
    # A quantized weight is computed from packed bytes (torch.nn.utils.parametrize)
    computed = list(getattr(module, "parametrizations", {}))
    # Biases of experts have two dimensions
    own = [name for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
    return [*own, *computed]


def computes_otherwise(kind: type[torch.nn.Module]) -> bool:
    """Return True for a linear class of transformers whose output is no plain product.

    LoRA adds a plain product to the output, which has another shape or meaning there.
    """
    own = issubclass(kind, torch.nn.Linear) and kind.__module__.startswith("transformers.")
    return own and not computes_plain_product(kind)


def computes_plain_product(kind: Any) -> bool:
    """Return True if a class of transformers computes what `nn.Linear` does, so it can be replaced."""
    return _computes_plain_product(kind)


@cache
def _computes_plain_product(kind: Any) -> bool:
    if not issubclass(kind, torch.nn.Linear) or not kind.__module__.startswith("transformers."):
        return False
    # The layer's weights are drawn from torch's generator, which must not depend on this check
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        try:
            layer, inputs = kind(8, 4), torch.randn(2, 3, 8)
            found = layer(inputs)
        except Exception:  # noqa: BLE001 - a class of its own can need anything, and is left as it is
            return False
        expected = torch.nn.functional.linear(inputs, layer.weight, layer.bias)
        return isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-6)


@contextmanager
def every_linear_weight() -> Iterator[None]:
    """Let loads within the context quantize experts and replaceable linear classes as well."""
    kinds = {"bitsandbytes_4bit": Wider4BitQuantizer, "bitsandbytes_8bit": Wider8BitQuantizer}
    before = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in kinds}
    auto.AUTO_QUANTIZER_MAPPING.update(kinds)
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(before)


class Wider8BitQuantizer(Bnb8BitHfQuantizer):  # type: ignore[misc]
    """transformers' 8-bit quantizer, for linear layers with a class of their own too."""

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, **options: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **options)
        _replace_own_classes(self, model)


class Wider4BitQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' 4-bit quantizer, for experts and linear layers with a class of their own too."""

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, **options: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **options)
        _replace_own_classes(self, model)
        self.experts = () if self.pre_quantized else tuple(expert_weights(model))
        self.states: dict[str, bnb.functional.QuantState] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Return True for the weights of replaced layers, and for those of experts."""
        needed: bool = super().param_needs_quantization(model, param_name, **options)
        return needed or param_name in self.experts

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that packs a weight while it is loaded."""
        return PackWeight(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        for name in self.experts:
            module, weight = get_module_from_name(model, name)
            setattr(module, IN_ORDER, (*getattr(module, IN_ORDER, ()), weight))
            unpack = Bnb4bitParametrization(self.states[name])
            # unsafe allows another dtype and shape than those of the packed bytes
            parametrize.register_parametrization(module, weight, unpack, unsafe=True)
            _register_parametrization_hooks(module, weight)
        return super()._process_model_after_weight_loading(model, **options)


class PackWeight(ConversionOps):  # type: ignore[misc]
    """Packs one weight to 4 bits: an expert stack here, every other one as transformers does."""

    def __init__(self, quantizer: Wider4BitQuantizer, usual: ConversionOps) -> None:
        self._quantizer = quantizer
        self._usual = usual

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        """Return the packed weights by name."""
        experts = {name for name in input_dict if name in self._quantizer.experts}
        usual = {name: value for name, value in input_dict.items() if name not in experts}
        packed = self._usual.convert(usual, **options) if usual else {}
        return packed | {name: self._pack(name, input_dict[name], **options) for name in experts}

    def _pack(self, name: str, value: Any, *, model: Any, **_: Any) -> torch.nn.Parameter:
        weight = value[0] if isinstance(value, list) else value
        config = self._quantizer.quantization_config
        data, self._quantizer.states[name] = bnb.functional.quantize_4bit(
            weight.to(model.get_parameter(name).dtype).contiguous(),
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
        return torch.nn.Parameter(data, requires_grad=False)


def _replace_own_classes(quantizer: Any, model: Any) -> None:
    """Turn linear layers with a replaceable class into `nn.Linear`, and replace those as usual."""
    names = [
        name
        for name, module in model.named_modules()
        if computes_plain_product(type(module))
        and should_convert_module(name, quantizer.modules_to_not_convert)
    ]
    for name in names:
        module = model.get_submodule(name)
        with torch.device("meta"):
            plain = torch.nn.Linear(
                module.in_features,
                module.out_features,
                module.bias is not None,
                dtype=module.weight.dtype,
            )
        # transformers replaces layers whose type is nn.Linear itself, and no subclass
        model.set_submodule(name, plain)
    if names:
        from transformers.integrations import replace_with_bnb_linear

        replace_with_bnb_linear(
            model,
            modules_to_not_convert=quantizer.modules_to_not_convert,
            quantization_config=quantizer.quantization_config,
            pre_quantized=quantizer.pre_quantized,
        )


@dataclass(frozen=True)
class QuantizedShare:
    """Weights in linear layers and experts, without the output head, and how many are quantized."""

    quantized: int
    total: int
    left: tuple[str, ...]
    """Kinds of weights that are not quantized."""

    @property
    def share(self) -> float:
        """Quantized weights as a share of all of them."""
        return self.quantized / self.total if self.total else 0.0

    def remarks(self, kind: str) -> list[str]:
        """Return a sentence on what is not quantized, or none."""
        if not self.left:
            return []
        more = ", …" if len(self.left) > SHOWN else ""
        return [
            f"{kind} quantizes {self.share:.1%} of the linear weights ({self.quantized:,} of "
            f"{self.total:,}). {', '.join(self.left[:SHOWN])}{more} stay as they are"
        ]


def quantized_share(model: PreTrainedModel, where: str, kind: str) -> QuantizedShare:
    """Count the quantized linear weights of a loaded model.

    Raises:
        ModelError: none is quantized.
    """
    quantized = total = 0
    left: dict[str, None] = {}
    kept = get_keys_to_not_convert(model)
    for name, numel, packed in _linear_weights(model):
        if not packed and not should_convert_module(name, kept):
            continue  # the head and what is tied to it
        total += numel
        quantized += numel if packed else 0
        if not packed:
            left[".".join(part for part in name.split(".")[-2:] if not part.isdigit())] = None
    if not quantized:
        raise ModelError(
            f"{where}: quantization={kind} quantizes none of this model's weights, because it has no "
            "linear layers that bitsandbytes can replace. Set quantization=none"
        )
    return QuantizedShare(quantized, total, tuple(left))


def _linear_weights(model: torch.nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield name, number of weights and whether they are quantized, of linear layers and experts."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield name, module.in_features * module.out_features, True
        elif isinstance(module, torch.nn.Linear | Conv1D):
            yield name, module.weight.numel(), False
        elif EXPERTS in type(module).__name__:
            yield from _stacks(name, module)


def _stacks(path: str, module: torch.nn.Module) -> Iterator[tuple[str, int, bool]]:
    packed = getattr(module, "parametrizations", {})
    for name in _stacked(module):
        if name in packed:
            yield f"{path}.{name}", unpacked_size(packed[name]), True
        else:
            yield f"{path}.{name}", module.get_parameter(name).numel(), False


def unpacked_size(weight: parametrize.ParametrizationList) -> int:
    """Return the number of weights in a packed stack."""
    unpack = next(part for part in weight if isinstance(part, Bnb4bitParametrization))
    return int(torch.Size(unpack.quant_state.shape).numel())


def hidden_weights(model: torch.nn.Module) -> int:
    """Return how many weights of packed stacks are not counted, because two share a byte."""
    return sum(
        unpacked_size(weight) - weight.original.numel()
        for module in model.modules()
        if EXPERTS in type(module).__name__
        for weight in getattr(module, "parametrizations", {}).values()
    )
