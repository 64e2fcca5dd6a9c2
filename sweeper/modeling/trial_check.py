"""Is a trial possible on its model? Answered on the meta device, before a weight is loaded.

Decides a rank that follows from adapter.trainable_parameters. Knows nothing of data and batches; what is
held whatever the batch is counted, and whoever knows the device compares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.errors import ModelError
from sweeper.core.outcome import TrialSize
from sweeper.modeling.adapter import OLORA_ON_CONV1D, count_parameters
from sweeper.modeling.hardware import choose_dtype
from sweeper.modeling.memory_estimate import MIB, held_dtype, hold, model_on_meta, quantized_weights
from sweeper.modeling.model_source import load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 0.1
"""By how much the nearest adapter may miss adapter.trainable_parameters, as a share of it.

Rounding to a whole rank misses by half a rank at most, which is within a tenth from r=5 on.
"""


class ModelChecks:
    """Checks trials against their models; every configuration is read, every answer found, once."""

    def __init__(self) -> None:
        self._configs: dict[str, PretrainedConfig] = {}
        self._sizes: dict[str, TrialSize] = {}

    def size(self, settings: TrialSettings, on: torch.device) -> TrialSize:
        """How large a trial is, its rank decided.

        Raises:
            ModelError: there is no such model, the adapter does not fit it, or no whole rank comes
                near adapter.trainable_parameters.
        """
        key = settings.structure
        if key not in self._sizes:
            model_key = settings.model.model_dump_json()
            if model_key not in self._configs:
                self._configs[model_key] = load_config(settings.model)
            self._sizes[key] = size_on_meta(settings, self._configs[model_key], on)
        return self._sizes[key]


def size_on_meta(settings: TrialSettings, config: PretrainedConfig, on: torch.device) -> TrialSize:
    """How large a trial is on an architecture; reads no file.

    Raises:
        ModelError: as `ModelChecks.size`.
    """
    adapter = settings.adapter
    if isinstance(adapter, LoraAdapter) and adapter.r is None:
        adapter = adapter.with_rank(
            nearest_rank(adapter, config, settings.model.attn_implementation)
        )
    dtype = held_dtype(adapter, choose_dtype(settings.model.dtype, on).dtype)
    model = model_on_meta(config, adapter, dtype, settings.model.attn_implementation)
    if isinstance(model, PeftModel):
        _require_trainable(model, settings)
    count = count_parameters(model)
    training = settings.training
    held = hold(model, settings.quantization, training.optim, on, training.shards)
    # the best checkpoint of a sharded trial is judged whole, on a device that has its share as well
    whole = held.weights * (training.shards + 1) if training.fsdp else 0
    need = max(held.mib, whole / MIB)
    rank = adapter.rank if isinstance(adapter, LoraAdapter) else None
    return TrialSize(trainable=count.trainable, total=count.total, rank=rank, held_mib=need)


def nearest_rank(adapter: LoraAdapter, config: PretrainedConfig, attn_implementation: str) -> int:
    """The whole r whose adapter has the number of trainable parameters nearest to the wanted one.

    PEFT itself counts, at r = 1 and r = 2: the count grows by the same number with every r (two
    matrices for each module), from what does not depend on r (DoRA's vectors, biases, modules_to_save,
    modules with a rank of their own).

    Raises:
        ModelError: the adapter does not fit, or its nearest count is further off than TOLERANCE.
    """
    wanted = adapter.trainable_parameters
    assert wanted is not None
    one, two = (
        count_parameters(
            model_on_meta(config, adapter.with_rank(r), torch.float32, attn_implementation)
        ).trainable
        for r in (1, 2)
    )
    step = two - one
    rank = 1 if step == 0 else max(1, round(1 + (wanted - one) / step))
    nearest = one + (rank - 1) * step
    if abs(nearest - wanted) > TOLERANCE * wanted:
        raise ModelError(
            f"adapter.trainable_parameters={wanted:,}: the nearest adapter on "
            f"target_modules={adapter.target_modules} has {nearest:,} (r={rank}; every r brings "
            f"{step:,}), which is {abs(nearest - wanted) / wanted:.0%} off; at most {TOLERANCE:.0%} "
            "is called equal"
        )
    return rank


def _require_trainable(model: PeftModel, settings: TrialSettings) -> None:
    """What only shows on the loaded model: weights that carry no gradient, or too few columns.

    Raises:
        ModelError: names the modules and the ways out.
    """
    adapter, kind = settings.adapter, settings.quantization.kind
    assert isinstance(adapter, LoraAdapter)
    if kind != "none":
        _require_floating_point(model, adapter.modules_to_save, kind)
    if adapter.init_lora_weights == "olora":
        _require_columns(model, quantized=kind != "none")


def _require_floating_point(model: PeftModel, modules_to_save: list[str], kind: str) -> None:
    """A module that is trained whole must not be held in 4 or 8 bits."""
    inside = [f".{name}." for name in quantized_weights(model)]
    wrong = [wanted for wanted in modules_to_save if any(f".{wanted}." in name for name in inside)]
    if wrong:
        raise ModelError(
            f"adapter.modules_to_save={modules_to_save}: on a quantized base ({kind}) the weights of "
            f"{', '.join(wrong)} cannot be trained; adapt them (target_modules), or choose "
            "quantization=none"
        )


def _require_columns(model: PeftModel, *, quantized: bool) -> None:
    """OLoRA takes r columns of a weight's QR decomposition; where there are fewer, PEFT takes those."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module.get_base_layer(), Conv1D) and not quantized:
            raise ModelError(OLORA_ON_CONV1D)
        rank, narrow = max(module.r.values()), min(module.in_features, module.out_features)
        if rank > narrow:
            raise ModelError(
                f"adapter.init_lora_weights=olora: r={rank} is more than {narrow}, the smaller side "
                f"of {name.rpartition('.')[2]}; choose a smaller r, or default or gaussian"
            )
