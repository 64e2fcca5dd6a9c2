"""Simulate one training step on shapes alone, and measure the bytes alive at its peak.

Every operation of the forward and backward pass runs on fake tensors, which have a shape and a dtype
but no storage. A dispatch mode adds up the storages that would be alive. Checkpointing, eager attention,
DoRA and any architecture therefore need no formula. Independent of quantization and optimizers.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SHALLOW, DEEP = 2, 4
"""Numbers of layers at which a uniform stack is simulated."""
FEW_ROWS = 2
"""Rows of the larger of the two batches from which others are extrapolated."""


@dataclass(frozen=True)
class StepWorkload:
    """Shape and options of one micro-batch."""

    batch_size: int
    length: int
    """Tokens per row, padding included."""
    activation_checkpointing: bool
    accumulates: bool
    """True if gradients are kept from one micro-batch to the next."""
    optim: str
    targets: int | None = None
    """Positions per row whose logits are computed, or None for all."""
    loss_chunk_size: int | None = None
    """Positions (over all rows) whose logits exist at once, or None for all."""
    shards: int = 1
    """Devices that weights, gradients and optimizer states are spread over (training.fsdp)."""
    padding_free: bool = False
    """True if the rows are one sequence without padding: `batch_size` is 1, `length` all tokens."""

    @property
    def logit_positions(self) -> int:
        """Positions per row whose logits exist at once."""
        positions = min(self.targets or self.length, self.length)
        if self.loss_chunk_size is None:
            return positions
        return min(positions, math.ceil(self.loss_chunk_size / self.batch_size))


@dataclass(frozen=True)
class PeakBytes:
    """Bytes alive at the peak of a step, without weights and optimizer states."""

    gradients: int
    activations: int
    logits: int

    @property
    def bytes(self) -> int:
        """Total bytes."""
        return self.gradients + self.activations + self.logits

    def extrapolated(self, further: PeakBytes, times: float) -> PeakBytes:
        """Return this peak plus `times` the difference between a further one and this one."""
        near, far = asdict(self), asdict(further)
        return PeakBytes(
            **{kind: round(near[kind] + times * (far[kind] - near[kind])) for kind in near}
        )


def simulate_step(
    model: PreTrainedModel | PeftModel, workload: StepWorkload, compute_dtype: torch.dtype
) -> PeakBytes:
    """Run one forward and backward pass on shapes alone and return the bytes alive at its peak.

    Args:
        model: the model on the meta device. It is unusable afterwards: see SimulatedSteps.
        workload: the micro-batch.
        compute_dtype: dtype of the forward pass.
    """
    return SimulatedSteps(model, compute_dtype).peak(workload)


class SimulatedSteps:
    """One model, built once, whose step is simulated for any number of micro-batches."""

    def __init__(self, model: PreTrainedModel | PeftModel, compute_dtype: torch.dtype) -> None:
        """
        Args:
            model: the model on the meta device. It is unusable afterwards, because its weights become
                fake tensors and its deeper layers are removed.
            compute_dtype: dtype of the forward pass.
        """
        self._model = model
        self._compute_dtype = compute_dtype
        self._layers = _layers(model)
        self._depth = len(self._layers)
        # Each layer of a uniform stack with an adapter adds the same bytes, so two small depths suffice.
        # In full fine-tuning gradients grow while activations shrink, and the peak moves with the depth
        self._extrapolates = (
            self._depth > DEEP
            and _uniform(self._layers)
            and not all(p.requires_grad for p in model.parameters())
        )
        if self._extrapolates:  # before the fake tensors, of which a deep model needs hundreds
            del self._layers[DEEP:]
        self._known: dict[StepWorkload, PeakBytes] = {}
        self._mode = FakeTensorMode()
        with self._mode:
            _replace_by_fake_tensors(model)

    def peak(self, workload: StepWorkload) -> PeakBytes:
        """Return the bytes alive at the peak of a step.

        Every row of a batch adds the same bytes to a stack with an adapter that keeps its activations,
        so two small batches suffice for all others. Each simulation is done once.
        """
        # With recomputed activations the peak moves from a layer to the logits as the batch grows
        kept = not workload.activation_checkpointing and workload.loss_chunk_size is None
        affine = self._extrapolates and kept
        if not affine or workload.batch_size <= FEW_ROWS:
            if workload not in self._known:
                self._known[workload] = self._simulated(workload)
            return self._known[workload]
        one, few = (self.peak(replace(workload, batch_size=size)) for size in (1, FEW_ROWS))
        return one.extrapolated(few, (workload.batch_size - 1) / (FEW_ROWS - 1))

    def _simulated(self, workload: StepWorkload) -> PeakBytes:
        if workload.activation_checkpointing:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            with self._mode:
                return self._peak(workload)
        finally:
            if workload.activation_checkpointing:
                base = getattr(self._model, "get_base_model", lambda: self._model)()
                base.activation_checkpointing_disable()
                base.disable_input_require_grads()

    def _peak(self, workload: StepWorkload) -> PeakBytes:
        deep = _simulate(self._model, workload, self._compute_dtype)
        if not self._extrapolates:
            return deep
        removed = list(self._layers)[SHALLOW:]
        del self._layers[SHALLOW:]
        shallow = _simulate(self._model, workload, self._compute_dtype)
        self._layers.extend(removed)
        return shallow.extrapolated(deep, (self._depth - SHALLOW) / (DEEP - SHALLOW))


def _simulate(
    model: PreTrainedModel | PeftModel, workload: StepWorkload, compute_dtype: torch.dtype
) -> PeakBytes:
    shape = (workload.batch_size, workload.length)
    ids = torch.zeros(shape, dtype=torch.long)
    # The placeholder of a batch without padding, for which no mask of all tokens by all tokens is made
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    mask = placeholder if workload.padding_free else torch.ones(shape, dtype=torch.long)
    positions = workload.logit_positions
    labels = torch.zeros(workload.batch_size * positions, dtype=torch.long)
    model.zero_grad()  # gradients of the simulation at another depth
    alive = AliveBytes(known=[*model.parameters(), *model.buffers()])
    hooks = _register_hooks(model, alive)
    with alive:
        _loss(model, ids, mask, labels, positions, compute_dtype).backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return alive.peak


def _layers(model: PreTrainedModel | PeftModel) -> torch.nn.ModuleList:
    """Return the stack of decoder layers, or an empty list if there is none."""
    depth = model.config.num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next((stack for stack in stacks if len(stack) == depth), torch.nn.ModuleList())


def _uniform(layers: torch.nn.ModuleList) -> bool:
    """Return True if all layers have and train weights of the same shapes."""
    shapes = {
        tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())
        for layer in layers
    }
    return len(shapes) == 1


def _loss(
    model: torch.nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    positions: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    enabled = compute_dtype != torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):  # fp16 has the same size
        logits = model(
            input_ids=ids, attention_mask=mask, logits_to_keep=positions, use_cache=False
        ).logits
        return cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are alive, by kind, and records the peak."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "activations"
        self.peak = PeakBytes(0, 0, 0)
        self._alive = {"gradients": 0, "activations": 0, "logits": 0}
        self._kinds: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]]
        self._kinds = weakref.WeakKeyDictionary()
        for tensor in known:
            # PeakBytes leaves out the weights, so their storages count as known
            self._kinds[tensor.untyped_storage()] = []

    def count_as_gradient(self, parameter: torch.Tensor) -> None:
        """Count the bytes of a parameter's complete gradient as gradients, no longer as activations."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        kind = self._kinds[storage]
        self._alive[kind[0]] -= storage.nbytes()
        self._alive["gradients"] += storage.nbytes()
        kind[0] = "gradients"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._kinds:  # a view of a storage that is already counted
            return
        kind, size = [self.kind], storage.nbytes()
        self._kinds[storage] = kind
        self._alive[self.kind] += size
        weakref.finalize(storage, self._release, kind, size)
        if sum(self._alive.values()) > self.peak.bytes:
            self.peak = PeakBytes(**self._alive)

    def _release(self, kind: list[str], size: int) -> None:
        self._alive[kind[0]] -= size


def _register_hooks(model: PreTrainedModel | PeftModel, alive: AliveBytes) -> list[Any]:
    """Register hooks that assign storages to logits (from the output head on) or gradients."""

    def enter(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        alive.kind = "logits"
        # The gradient of the head's input is complete when the backward pass leaves the head
        if inputs[0].requires_grad:
            inputs[0].register_hook(leave)  # type: ignore[no-untyped-call]

    def leave(_: torch.Tensor) -> None:
        alive.kind = "activations"

    head = model.get_output_embeddings()
    hooks: list[Any] = [
        parameter.register_post_accumulate_grad_hook(alive.count_as_gradient)  # type: ignore[no-untyped-call]
        for parameter in trainable(model)
    ]
    return [*hooks, head.register_forward_pre_hook(enter)] if head is not None else hooks


def _replace_by_fake_tensors(model: torch.nn.Module) -> None:
    """Replace meta parameters and buffers by fake CPU tensors. Tied parameters stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) not in made:
                fake = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = torch.nn.Parameter(fake, requires_grad=old.requires_grad)
                made[id(made[id(old)])] = made[id(old)]
            if old is not None:
                module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that get a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
