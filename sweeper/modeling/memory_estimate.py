"""How much memory a trial needs, before a weight is loaded.

Builds the architecture on the meta device, attaches the adapter, counts what is held all the time, and
adds the fullest moment of a rehearsed training step (modeling/rehearsal.py). It knows the sizes of
quantized weights and of optimizer states (bitsandbytes, torch), and no formula of any architecture.

It does not count what no tensor holds: the interpreter, the CUDA context (about 0.5 GiB), a library's
own buffers, fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sweeper.config.settings import LoraAdapter, NoAdapter, QuantizationSettings, TrialSettings
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import attach
from sweeper.modeling.blocks import largest_gathered
from sweeper.modeling.hardware import choose_dtype
from sweeper.modeling.model_source import load_config, one_line
from sweeper.modeling.step_memory import PeakBytes, StepWorkload, rehearse, trainable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MIB = 2**20
BLOCK_4BIT = 64
"""bitsandbytes: weights that share one scale."""
NESTED_BLOCK = 256
"""bitsandbytes: scales that share one scale of their own under double quantization."""
CODES_4BIT = 16 * 4
CODES_8BIT = 256 * 4
BLOCK_8BIT_STATE = 256
MIN_8BIT_STATE = 4096
"""bitsandbytes: an optimizer state of fewer elements stays in fp32."""


@dataclass(frozen=True)
class MemoryEstimate:
    """MiB of device memory at a trial's peak, by what it is spent on."""

    weights: float
    """The base as it is held: quantized weights with their scales, the rest in its dtype."""
    adapter: float
    """Trainable weights beside the base, in fp32."""
    optimizer: float
    gradients: float
    activations: float
    """What the forward pass keeps for the backward pass, and both passes' own temporaries."""
    logits: float
    """The output head's result and the loss over it."""
    workspace: float
    """One quantized weight unpacked for its product, one block gathered from the devices with its
    gradient (training.fsdp), or the optimizer step's temporaries."""

    @property
    def total(self) -> float:
        """MiB at the peak."""
        return math.fsum(asdict(self).values())

    def table(self) -> str:
        """The estimate for people, largest line last."""
        lines = [f"{words:<52}{getattr(self, name):>12,.0f} MiB" for name, words in WORDS.items()]
        return "\n".join([*lines, f"{'estimated peak':<52}{self.total:>12,.0f} MiB"])


WORDS = {
    "weights": "the base model's weights",
    "adapter": "the adapter's weights",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "logits": "logits and loss",
    "workspace": "temporaries (unpacked or gathered weights, optimizer step)",
}
assert list(WORDS) == [field.name for field in fields(MemoryEstimate)]


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a training holds whatever its batch."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def mib(self) -> float:
        """All of them."""
        return (self.weights + self.adapter + self.gradients + self.optimizer) / MIB


def hold(
    model: PreTrainedModel | PeftModel,
    quantization: QuantizationSettings,
    optim: str,
    on: torch.device,
    shards: int = 1,
) -> HeldBytes:
    """What each of `shards` devices would hold while they train this model, built on the meta device.

    The model's frozen weights get the dtype in which they are held beside quantized ones. The states of
    a paged optimizer do not count on a GPU: it moves them out of the device's way.
    """
    packed = quantized_weights(model) if quantization.kind != "none" else {}
    if packed:
        _hold_the_rest_in_fp32(model, packed)
    weights, adapter = _resident_bytes(model, packed, quantization)
    learned = trainable(model)
    pages = optim.startswith("paged") and on.type == "cuda"
    states = 0 if pages else sum(state_bytes(p.numel(), optim) for p in learned)
    gradients = sum(p.numel() * p.element_size() for p in learned)
    return HeldBytes(*(math.ceil(part / shards) for part in (weights, adapter, gradients, states)))


def estimate_trial(
    settings: TrialSettings,
    on: torch.device,
    *,
    length: int,
    targets: int | None = None,
) -> MemoryEstimate:
    """The memory a trial needs on a device.

    Args:
        settings: the trial; activation_checkpointing=auto counts as off.
        on: decides what dtype auto means.
        length: tokens per row of the longest batch.
        targets: positions per row that carry loss; None for all.

    Raises:
        ModelError: there is no such architecture, or the adapter does not fit it.
    """
    training = settings.training
    workload = StepWorkload(
        batch_size=training.per_device_train_batch_size,
        length=length,
        activation_checkpointing=training.activation_checkpointing is True,
        accumulates=training.gradient_accumulation_steps > 1,
        optim=training.optim,
        targets=targets,
        loss_chunk_size=training.loss_chunk_size,
        shards=training.shards,
    )
    return estimate(
        load_config(settings.model),
        settings.adapter,
        settings.quantization,
        workload,
        compute_dtype=choose_dtype(settings.model.dtype, on).dtype,
        attn_implementation=settings.model.attn_implementation,
        on=on,
    )


def estimate(
    config: PretrainedConfig,
    adapter: LoraAdapter | NoAdapter,
    quantization: QuantizationSettings,
    workload: StepWorkload,
    *,
    compute_dtype: torch.dtype,
    attn_implementation: str,
    on: torch.device,
) -> MemoryEstimate:
    """The memory that training this architecture needs; reads no file.

    Raises:
        ModelError: the adapter does not fit the architecture.
    """
    model = model_on_meta(config, adapter, held_dtype(adapter, compute_dtype), attn_implementation)
    shards = workload.shards
    held = hold(model, quantization, workload.optim, on, shards)
    sizes = [math.ceil(p.numel() / shards) for p in trainable(model)]
    step = step_workspace(sizes, workload.optim, on)
    packed = quantized_weights(model) if quantization.kind != "none" else {}
    unpacked = _largest(packed, compute_dtype)
    peak = rehearse(model, workload, compute_dtype)
    if shards > 1:  # one block at a time is whole, with its gradient
        unpacked = 2 * largest_gathered(model)
        peak = replace(peak, gradients=math.ceil(peak.gradients / shards))
    if workload.accumulates:
        peak = replace(peak, gradients=held.gradients)
    if peak.bytes + unpacked >= held.gradients + step:
        workspace = unpacked
    else:  # the optimizer's step needs most
        peak, workspace = PeakBytes(held.gradients, 0, 0), step
    return MemoryEstimate(
        weights=held.weights / MIB,
        adapter=held.adapter / MIB,
        optimizer=held.optimizer / MIB,
        gradients=peak.gradients / MIB,
        activations=peak.activations / MIB,
        logits=peak.logits / MIB,
        workspace=workspace / MIB,
    )


def held_dtype(adapter: LoraAdapter | NoAdapter, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the base's weights: full fine-tuning trains fp32 master weights."""
    return torch.float32 if isinstance(adapter, NoAdapter) else compute_dtype


def model_on_meta(
    config: PretrainedConfig,
    adapter: LoraAdapter | NoAdapter,
    dtype: torch.dtype,
    attn_implementation: str,
) -> PreTrainedModel | PeftModel:
    """The architecture with its adapter, as it is trained, without storage.

    Raises:
        ModelError: the adapter does not fit the architecture.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )
    except (ValueError, ImportError) as error:
        where = f"model.attn_implementation={attn_implementation}"
        raise ModelError(one_line(where, error)) from error
    if isinstance(adapter, NoAdapter):
        return model.train()
    # every initialisation has the same shapes; OLoRA's would decompose weights that are not there
    return attach(model, adapter.model_copy(update={"init_lora_weights": "default"})).train()


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is quantized while the model is loaded."""

    weight: torch.Tensor
    rows: int
    """Output features: an 8-bit weight has one scale for each."""


def quantized_weights(model: PreTrainedModel | PeftModel) -> dict[str, QuantizedWeight]:
    """What transformers quantizes, by module name: every linear map but the head and what is tied."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = [_plain(name) for name in get_keys_to_not_convert(base)]
    return {
        _plain(name): _quantized(module)
        for name, module in base.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D)
        and not {"lora_A", "lora_B", "modules_to_save"} & set(name.split("."))
        and should_convert_module(_plain(name), kept)
    }


def _plain(name: str) -> str:
    """A module's name in the base without its adapter."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _quantized(module: torch.nn.Module) -> QuantizedWeight:
    assert isinstance(module.weight, torch.Tensor)
    columns = isinstance(module, Conv1D)  # stored transposed
    return QuantizedWeight(module.weight, int(module.weight.shape[1 if columns else 0]))


def packed_bytes(numel: int, rows: int, quantization: QuantizationSettings) -> int:
    """Bytes of one quantized weight with its scales and code tables, as bitsandbytes holds them."""
    if quantization.load_in_8bit:
        return numel + 4 * rows  # one fp32 scale per output row
    scales = math.ceil(numel / BLOCK_4BIT)
    packed = math.ceil(numel / 2) + CODES_4BIT
    if not quantization.bnb_4bit_use_double_quant:
        return packed + 4 * scales
    nested = 4 * math.ceil(scales / NESTED_BLOCK) + CODES_8BIT + 4  # + the offset
    return packed + scales + nested


def state_bytes(numel: int, optim: str) -> int:
    """Bytes of AdamW's two moments for one parameter tensor."""
    if "8bit" not in optim or numel < MIN_8BIT_STATE:
        return 8 * numel
    return 2 * (numel + 4 * math.ceil(numel / BLOCK_8BIT_STATE))


def _hold_the_rest_in_fp32(
    model: PreTrainedModel | PeftModel, packed: Mapping[str, QuantizedWeight]
) -> None:
    """As PEFT's preparation for k-bit training does: embeddings, norms and the head become fp32."""
    quantized = {id(found.weight) for found in packed.values()}
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.to(torch.float32)


def _resident_bytes(
    model: PreTrainedModel | PeftModel,
    packed: Mapping[str, QuantizedWeight],
    quantization: QuantizationSettings,
) -> tuple[int, int]:
    """Bytes of the frozen (or, without an adapter, all) weights, and of what an adapter trains."""
    rows = {id(found.weight): found.rows for found in packed.values()}
    weights = adapter = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if id(parameter) in rows:
            weights += packed_bytes(parameter.numel(), rows[id(parameter)], quantization)
        elif parameter.requires_grad and isinstance(model, PeftModel):
            adapter += size
        else:
            weights += size
    return weights, adapter


def _largest(packed: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> int:
    """Bytes of the largest quantized weight once it is unpacked for a product."""
    return max((found.weight.numel() for found in packed.values()), default=0) * dtype.itemsize


def step_workspace(sizes: list[int], optim: str, on: torch.device) -> int:
    """Bytes of an optimizer step's temporaries beside gradients and states.

    torch's AdamW on CUDA takes the square root of all second moments at once (foreach); elsewhere, and
    in the fused and 8-bit ones, one tensor at a time or none.
    """
    if optim == "adamw_torch":
        return 4 * (sum(sizes) if on.type == "cuda" else 2 * max(sizes))
    return 0
