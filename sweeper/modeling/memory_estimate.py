"""Estimate how much memory a trial needs, without loading weights.

Builds the architecture on the meta device, attaches the adapter, counts the bytes held during the whole
training, and adds the peak of a simulated training step (sweeper.modeling.step_memory). Sizes of
quantized weights and optimizer states follow bitsandbytes and torch. No formula depends on an
architecture.

The estimate counts tensors only. It leaves out the interpreter, the CUDA context (about 0.5 GiB),
libraries' own buffers and fragmentation. On a CPU the resident size of an fp32 LoRA trial was 1.7 times
the estimate, because glibc keeps freed blocks (MALLOC_MMAP_THRESHOLD_=65536 returns them).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sweeper.config.settings import LoraAdapter, NoAdapter, QuantizationSettings, TrialSettings
from sweeper.config.trial_settings import WITHOUT_SIZE
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import attach
from sweeper.modeling.blocks import largest_gathered
from sweeper.modeling.even_experts import even_experts
from sweeper.modeling.expert_weights import computes_plain_product, expert_weights
from sweeper.modeling.frozen_linear import is_kept, unpacked_shapes
from sweeper.modeling.hardware import choose_dtype
from sweeper.modeling.held_precision import hold_frozen
from sweeper.modeling.model_source import in_full, load_config
from sweeper.modeling.step_memory import PeakBytes, SimulatedSteps, StepWorkload, trainable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MIB = 2**20
BLOCK_4BIT = 64
"""Number of weights that share one scale in bitsandbytes."""
NESTED_BLOCK = 256
"""Number of scales that share one second-level scale under bitsandbytes' double quantization."""
CODES_4BIT = 16 * 4
"""Bytes of the table of 4-bit code values in fp32."""
CODES_8BIT = 256 * 4
"""Bytes of the table of 8-bit code values in fp32."""
BLOCK_8BIT_STATE = 256
"""Elements of an 8-bit optimizer state that share one fp32 scale."""
MIN_8BIT_STATE = 4096
"""Elements below which bitsandbytes keeps an optimizer state in fp32."""

MIN_PAGED_STATE = 100_000
"""Elements below which a paged optimizer of bitsandbytes allocates states as any other does."""


@dataclass(frozen=True)
class MemoryEstimate:
    """MiB of device memory at a trial's peak, by use."""

    weights: float
    """The base: quantized weights with their scales, and the other weights in their dtype."""
    adapter: float
    """The adapter's trainable weights in fp32."""
    optimizer: float
    gradients: float
    activations: float
    """Activations kept for the backward pass, and temporaries of both passes."""
    logits: float
    """The output head's result and the loss computed from it."""
    workspace: float
    """The largest of: one quantized weight unpacked for a matrix product, one block gathered from the
    devices with its gradient (training.fsdp), or the optimizer step's temporaries."""

    @property
    def total(self) -> float:
        """MiB at the peak."""
        return math.fsum(asdict(self).values())

    def table(self) -> str:
        """Return the estimate as a text table with the total in the last line."""
        lines = [f"{label:<52}{getattr(self, name):>12,.0f} MiB" for name, label in LABELS.items()]
        return "\n".join([*lines, f"{'estimated peak':<52}{self.total:>12,.0f} MiB"])


LABELS = {
    "weights": "the base model's weights",
    "adapter": "the adapter's weights",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "logits": "logits and loss",
    "workspace": "temporaries (unpacked or gathered weights, optimizer step)",
}
assert list(LABELS) == [field.name for field in fields(MemoryEstimate)]


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a training holds independently of its batch."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def mib(self) -> float:
        """Total in MiB."""
        return (self.weights + self.adapter + self.gradients + self.optimizer) / MIB


def held_bytes(
    model: PreTrainedModel | PeftModel,
    quantization: QuantizationSettings,
    optim: str,
    on: torch.device,
    shards: int = 1,
) -> HeldBytes:
    """Return the bytes that each of `shards` devices would hold during the training of a model.

    Args:
        model: the model on the meta device. If weights are quantized, the others get the dtypes in
            which a loaded base holds them.
        quantization: the base's quantization.
        optim: transformers' name of the optimizer.
        on: the device.
        shards: devices that weights, gradients and optimizer states are spread over.
    """
    packed = packed_weights(model, quantization)
    if packed:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        hold_frozen(base, base.dtype, {id(found.weight) for found in packed.values()})
    weights, adapter = _resident_bytes(model, packed, quantization)
    learned = trainable(model)
    states = sum(
        state_bytes(p.numel(), optim) for p in learned if not _is_paged(p.numel(), optim, on)
    )
    gradients = sum(p.numel() * p.element_size() for p in learned)
    return HeldBytes(*(math.ceil(part / shards) for part in (weights, adapter, gradients, states)))


def estimate_trial(
    settings: TrialSettings,
    on: torch.device,
    *,
    length: int,
    targets: int | None = None,
    padding_free: bool = False,
) -> MemoryEstimate:
    """Estimate the memory that a trial needs on a device.

    Args:
        settings: the trial. activation_checkpointing=auto counts as off.
        on: the device, which decides dtype=auto and the optimizer's temporaries.
        length: tokens per row of the longest batch. Without padding, tokens of a whole micro-batch.
        targets: positions per row that carry loss, or None for all. Without padding, of a micro-batch.
        padding_free: True if micro-batches have no padding.

    Raises:
        ModelError: the architecture does not exist, or the adapter does not fit it.
    """
    training = settings.training
    workload = StepWorkload(
        batch_size=1 if padding_free else training.per_device_train_batch_size,
        length=length,
        activation_checkpointing=training.activation_checkpointing is True,
        accumulates=training.gradient_accumulation_steps > 1,
        optim=training.optim,
        targets=targets,
        loss_chunk_size=training.loss_chunk_size,
        shards=training.shards,
        padding_free=padding_free,
    )
    return estimate(
        load_config(settings.model),
        settings.adapter,
        settings.quantization,
        workload,
        compute_dtype=choose_dtype(settings.model.dtype, on).dtype,
        attn_implementation=settings.model.requested_attention,
        on=on,
    )


def estimate(
    config: PretrainedConfig,
    adapter: LoraAdapter | NoAdapter,
    quantization: QuantizationSettings,
    workload: StepWorkload,
    *,
    compute_dtype: torch.dtype,
    attn_implementation: str | None,
    on: torch.device,
) -> MemoryEstimate:
    """Estimate the memory that training an architecture needs, without reading files.

    Raises:
        ModelError: the adapter does not fit the architecture.
    """
    form = EstimatedForm(
        config=config.to_json_string(),
        adapter=adapter,
        quantization=quantization,
        compute_dtype=compute_dtype,
        attn_implementation=attn_implementation,
        optim=workload.optim,
        shards=workload.shards,
        on=on,
    )
    built = _built(form, config)
    shards, held, step, unpacked = workload.shards, built.held, built.step, built.unpacked
    peak = _peak(form, built, workload)
    peak = replace(peak, activations=peak.activations + _kept_unpacked(built, workload))
    # FSDP gathers one block at a time, and its gradient is whole before the reduction
    if shards > 1:
        unpacked = built.gathered
        peak = replace(peak, gradients=math.ceil(peak.gradients / shards))
    if workload.accumulates:  # all gradients of earlier micro-batches are alive at the peak
        peak = replace(peak, gradients=held.gradients)
    if peak.bytes + unpacked >= held.gradients + step:
        workspace = unpacked
    else:  # the peak is in the optimizer's step, when no activations are alive
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


@dataclass(frozen=True)
class EstimatedForm:
    """Everything that decides the model which an estimate builds, whatever the batch."""

    config: str
    """The architecture as JSON."""
    adapter: LoraAdapter | NoAdapter
    quantization: QuantizationSettings
    compute_dtype: torch.dtype
    attn_implementation: str | None
    optim: str
    shards: int
    on: torch.device

    @property
    def key(self) -> str:
        """The form as text."""
        return self._text(self.adapter.model_dump_json())

    @property
    def key_of_all_ranks(self) -> str:
        """The part of the key that forms share if they differ only in the rank of their adapter."""
        dropout = isinstance(self.adapter, LoraAdapter) and self.adapter.lora_dropout > 0
        return self._text(f"{self.adapter.model_dump_json(exclude=UNSIZED)} {dropout}")

    def _text(self, adapter: str) -> str:
        parts = (self.config, adapter, self.quantization.model_dump_json(), self.compute_dtype)
        return " ".join(
            map(str, (*parts, self.attn_implementation, self.optim, self.shards, self.on))
        )


@dataclass(frozen=True)
class BuiltForm:
    """The model of a form on the meta device, and its sizes in bytes."""

    model: PreTrainedModel | PeftModel
    compute_dtype: torch.dtype
    held: HeldBytes
    step: int
    """Bytes of the optimizer step's temporaries."""
    unpacked: int
    """Bytes of the largest quantized weight in the compute dtype."""
    gathered: int
    """Bytes of the largest block of a sharded model and its gradient, or 0 without sharding."""
    kept: tuple[torch.Size, ...]
    """Shapes of the 4-bit weights that a CPU's backward pass may keep unpacked in fp32."""
    layers: int
    """Number of decoder layers."""

    @cached_property
    def steps(self) -> SimulatedSteps:
        """The steps of the model, which is taken apart for them when the first one is simulated."""
        return SimulatedSteps(self.model, self.compute_dtype)


UNSIZED = {"r", *WITHOUT_SIZE}
"""Keys of an adapter in which forms of one key_of_all_ranks may differ."""
_simulated: dict[tuple[str, StepWorkload], dict[int, PeakBytes]] = {}
"""Peaks that were simulated, by rank."""


def _peak(form: EstimatedForm, built: BuiltForm, workload: StepWorkload) -> PeakBytes:
    """Return the peak of a step, interpolated if it is known at a lower and at a higher rank.

    What is alive at any moment of a step grows linearly with the rank. Its maximum over the step is
    therefore convex, so an interpolated peak is never too low. Between ranks 4 and 256 it was equal to
    the simulated one for the shapes of benchmarks/estimate_seconds.py.
    """
    rank = form.adapter.r if isinstance(form.adapter, LoraAdapter) else None
    if rank is None:
        return built.steps.peak(workload)
    known = _simulated.setdefault((form.key_of_all_ranks, workload), {})
    below, above = [r for r in known if r < rank], [r for r in known if r > rank]
    if rank not in known and below and above:
        low, high = max(below), min(above)
        return known[low].extrapolated(known[high], (rank - low) / (high - low))
    if rank not in known:
        known[rank] = built.steps.peak(workload)
    return known[rank]


_last_built: dict[str, BuiltForm] = {}
"""The latest form. A trial asks for several batches of its form before its first step."""


def _built(form: EstimatedForm, config: PretrainedConfig) -> BuiltForm:
    """Return the built form, from the last call if that had the same one."""
    if form.key not in _last_built:
        _last_built.clear()
        _last_built[form.key] = _build(form, config)
    return _last_built[form.key]


def _build(form: EstimatedForm, config: PretrainedConfig) -> BuiltForm:
    dtype = held_dtype(form.adapter, form.compute_dtype)
    model = model_on_meta(config, form.adapter, dtype, form.attn_implementation)
    held = held_bytes(model, form.quantization, form.optim, form.on, form.shards)
    sizes = [math.ceil(p.numel() / form.shards) for p in trainable(model)]
    packed = packed_weights(model, form.quantization)
    return BuiltForm(
        model=model,
        compute_dtype=form.compute_dtype,
        held=held,
        step=step_workspace(sizes, form.optim, form.on),
        unpacked=_largest(packed, form.compute_dtype),
        # the weights of a block and their gradient
        gathered=2 * largest_gathered(model) if form.shards > 1 else 0,
        kept=_unpacked_shapes(form, model, packed),
        layers=model.config.num_hidden_layers,
    )


def _unpacked_shapes(
    form: EstimatedForm,
    model: PreTrainedModel | PeftModel,
    packed: Mapping[str, QuantizedWeight],
) -> tuple[torch.Size, ...]:
    """Return the shapes of the weights that sweeper.modeling.frozen_linear may keep unpacked."""
    fused = form.on.type == "cpu" and form.compute_dtype is torch.float32
    if not (fused and form.quantization.load_in_4bit and isinstance(model, PeftModel)):
        return ()
    return tuple(unpacked_shapes(model, {id(found.weight) for found in packed.values()}))


def _kept_unpacked(built: BuiltForm, workload: StepWorkload) -> int:
    """Return the bytes of the unpacked weights that are alive at the end of the forward pass."""
    tokens = workload.batch_size * workload.length
    kept = sum(4 * shape.numel() for shape in built.kept if is_kept(shape[0], tokens))
    # Recomputed activations are those of one layer at a time
    return kept // built.layers if workload.activation_checkpointing else kept


def held_dtype(adapter: LoraAdapter | NoAdapter, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the base's weights: fp32 master weights for full fine-tuning."""
    return torch.float32 if isinstance(adapter, NoAdapter) else compute_dtype


def model_on_meta(
    config: PretrainedConfig,
    adapter: LoraAdapter | NoAdapter,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> PreTrainedModel | PeftModel:
    """Build the architecture with its adapter in training mode on the meta device.

    Raises:
        ModelError: the adapter does not fit the architecture.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # transformers writes dtype and attention into what it gets
                dtype=dtype,
                attn_implementation=attn_implementation,
                **even_experts(config),
            )
    except (ValueError, ImportError) as error:
        where = f"model.attn_implementation={attn_implementation or 'auto'}"
        raise ModelError(in_full(where, error)) from error
    if isinstance(adapter, NoAdapter):
        return model.train()
    # All initialisations have the same shapes, but OLoRA's would decompose weights without storage
    return attach(model, adapter.model_copy(update={"init_lora_weights": "default"})).train()


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is quantized while the model is loaded."""

    weight: torch.Tensor
    rows: int
    """Number of output features. An 8-bit weight has one scale for each."""


def packed_weights(
    model: PreTrainedModel | PeftModel, quantization: QuantizationSettings
) -> dict[str, QuantizedWeight]:
    """Return the weights that a quantization packs: with 4 bits, the experts' as well."""
    if quantization.kind == "none":
        return {}
    found = quantized_weights(model)
    return found | _packed_experts(model) if quantization.load_in_4bit else found


def _packed_experts(model: PreTrainedModel | PeftModel) -> dict[str, QuantizedWeight]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = {name.replace(".base_layer", ""): weight for name, weight in base.named_parameters()}
    return {
        name: QuantizedWeight(weights[name], int(weights[name].shape[0]))
        for name in expert_weights(base)
    }


def quantized_weights(model: PreTrainedModel | PeftModel) -> dict[str, QuantizedWeight]:
    """Return the weights that transformers quantizes, by module name.

    These are the weights of all linear layers except the head and tied weights.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = [_plain(name) for name in get_keys_to_not_convert(base)]
    return {
        _plain(name): _quantized(module)
        for name, module in base.named_modules()
        # transformers replaces nn.Linear itself, and no subclass
        if (type(module) in (torch.nn.Linear, Conv1D) or computes_plain_product(type(module)))
        and not {"lora_A", "lora_B", "modules_to_save"} & set(name.split("."))
        and should_convert_module(_plain(name), kept)
    }


def _plain(name: str) -> str:
    """Return a module's name in the base without adapter."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _quantized(module: torch.nn.Module) -> QuantizedWeight:
    assert isinstance(module.weight, torch.Tensor)
    transposed = isinstance(module, Conv1D)
    return QuantizedWeight(module.weight, int(module.weight.shape[1 if transposed else 0]))


def packed_bytes(numel: int, rows: int, quantization: QuantizationSettings) -> int:
    """Return the bytes of one quantized weight with scales and code tables in bitsandbytes' layout."""
    if quantization.load_in_8bit:
        return numel + 4 * rows  # one fp32 scale per output row
    scales = math.ceil(numel / BLOCK_4BIT)
    packed = math.ceil(numel / 2) + CODES_4BIT
    if not quantization.bnb_4bit_use_double_quant:
        return packed + 4 * scales
    # 4 bytes for the mean of the scales
    nested = 4 * math.ceil(scales / NESTED_BLOCK) + CODES_8BIT + 4
    return packed + scales + nested


def _is_paged(numel: int, optim: str, on: torch.device) -> bool:
    """Return True if the states of a tensor move to CPU memory when the GPU needs the space."""
    return optim.startswith("paged") and on.type == "cuda" and numel >= MIN_PAGED_STATE


def state_bytes(numel: int, optim: str) -> int:
    """Return the bytes of AdamW's two moments for one parameter tensor."""
    if "8bit" not in optim or numel < MIN_8BIT_STATE:
        # two moments in float32
        return 8 * numel
    return 2 * (numel + 4 * math.ceil(numel / BLOCK_8BIT_STATE))


def _resident_bytes(
    model: PreTrainedModel | PeftModel,
    packed: Mapping[str, QuantizedWeight],
    quantization: QuantizationSettings,
) -> tuple[int, int]:
    """Return the bytes of the base's weights and the bytes of the adapter's trainable weights."""
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
    """Return the bytes of the largest quantized weight, unpacked for a matrix product."""
    return max((found.weight.numel() for found in packed.values()), default=0) * dtype.itemsize


def step_workspace(sizes: list[int], optim: str, on: torch.device) -> int:
    """Return the bytes of an optimizer step's temporaries, in addition to gradients and states.

    Args:
        sizes: elements of each trainable tensor on this device.
        optim: transformers' name of the optimizer.
        on: the device.
    """
    # torch's AdamW on CUDA computes the square roots of all second moments at once (foreach). Fused
    # ones, which it is on a CPU, and 8-bit optimizers need no temporaries
    return 4 * sum(sizes) if optim == "adamw_torch" and on.type == "cuda" else 0
