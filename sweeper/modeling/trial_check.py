"""Check on the meta device, before weights are loaded, if a trial is possible on its model.

Computes the rank for adapter.trainable_parameters, and the memory that does not depend on the batch. The
caller compares that memory with the device's. Independent of data and batches.
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
from sweeper.modeling.hardware import choose_dtype, dtype_name
from sweeper.modeling.memory_estimate import (
    MIB,
    held_bytes,
    held_dtype,
    model_on_meta,
    quantized_weights,
)
from sweeper.modeling.model_source import load_config_and_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 0.1
"""Largest allowed deviation of the nearest adapter from adapter.trainable_parameters, as a share of it.

Rounding to a whole rank deviates by at most half a rank, which is within a tenth from r=5 on.
"""


class ModelChecks:
    """Checks trials against their models, and caches configurations and results."""

    def __init__(self) -> None:
        self._configs: dict[str, tuple[PretrainedConfig, str]] = {}
        """Configurations and their digests by the model's settings."""
        self._sizes: dict[str, TrialSize] = {}

    def size(self, settings: TrialSettings, on: torch.device) -> TrialSize:
        """Return the size of a trial, with its rank.

        Raises:
            ModelError: the model does not exist, the adapter does not fit it, or no whole rank comes
                near adapter.trainable_parameters.
        """
        # A check costs about a CPU second on an 8B architecture. `structure` is all it depends on
        key = settings.structure
        if key not in self._sizes:
            self._sizes[key] = size_on_meta(settings, self._config(settings)[0], on)
        return self._sizes[key]

    def config_digest(self, settings: TrialSettings) -> str:
        """Return the digest of the configuration that a trial was checked against."""
        return self._config(settings)[1]

    def _config(self, settings: TrialSettings) -> tuple[PretrainedConfig, str]:
        key = settings.model.model_dump_json()
        if key not in self._configs:
            self._configs[key] = load_config_and_digest(settings.model)
        return self._configs[key]


def size_on_meta(settings: TrialSettings, config: PretrainedConfig, on: torch.device) -> TrialSize:
    """Return the size of a trial on an architecture, without reading files.

    Raises:
        ModelError: see `ModelChecks.size`.
    """
    adapter = settings.adapter
    if isinstance(adapter, LoraAdapter) and adapter.r is None:
        adapter = adapter.with_rank(
            nearest_rank(adapter, config, settings.model.requested_attention)
        )
    dtype = held_dtype(adapter, choose_dtype(settings.model.dtype, on).dtype)
    model = model_on_meta(config, adapter, dtype, settings.model.requested_attention)
    if isinstance(model, PeftModel):
        _require_trainable(model, settings)
        _require_exact_bias(settings, choose_dtype(settings.model.dtype, on).dtype, on)
    count = count_parameters(model)
    training = settings.training
    held = held_bytes(model, settings.quantization, training.optim, on, training.shards)
    # The best checkpoint of a sharded trial is loaded whole on a device that still holds its share
    whole = held.weights * (training.shards + 1) if training.fsdp else 0
    need = max(held.mib, whole / MIB)
    rank = adapter.rank if isinstance(adapter, LoraAdapter) else None
    return TrialSize(trainable=count.trainable, total=count.total, rank=rank, held_mib=need)


def nearest_rank(
    adapter: LoraAdapter, config: PretrainedConfig, attn_implementation: str | None
) -> int:
    """Return the whole r whose adapter comes nearest to adapter.trainable_parameters.

    Raises:
        ModelError: the adapter does not fit, or its nearest count deviates by more than TOLERANCE.
    """
    wanted = adapter.trainable_parameters
    assert wanted is not None
    # The count is affine in r: every r adds two vectors for each module, and DoRA's vectors, biases,
    # modules_to_save and modules in rank_pattern do not depend on r. So PEFT counts at r=1 and r=2
    one, two = (
        count_parameters(
            # the dtype does not change the count
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
            f"target_modules={adapter.target_modules} has {nearest:,} (r={rank}, each rank adds "
            f"{step:,}), which is {abs(nearest - wanted) / wanted:.0%} off. At most {TOLERANCE:.0%} "
            "is allowed"
        )
    return rank


def _require_trainable(model: PeftModel, settings: TrialSettings) -> None:
    """Refuse adapters that PEFT would reject only on the loaded model.

    Raises:
        ModelError: a trained module is quantized, or OLoRA's rank exceeds a weight's smaller side.
    """
    adapter, kind = settings.adapter, settings.quantization.kind
    assert isinstance(adapter, LoraAdapter)
    if kind != "none":
        _require_floating_point(model, adapter.modules_to_save, kind)
    if adapter.init_lora_weights == "olora":
        _require_columns(model, quantized=kind != "none")


def _require_exact_bias(settings: TrialSettings, dtype: torch.dtype, on: torch.device) -> None:
    """Refuse trained biases that bitsandbytes would round to the compute dtype in every forward pass.

    Raises:
        ModelError: biases are trained on a quantized base that computes below fp32.
    """
    adapter, quantization = settings.adapter, settings.quantization
    assert isinstance(adapter, LoraAdapter)
    named = quantization.bnb_4bit_compute_dtype
    packed = (
        dtype if named == "auto" or quantization.load_in_8bit else choose_dtype(named, on).dtype
    )
    exact = dtype == packed == torch.float32
    if adapter.bias != "none" and quantization.kind != "none" and not exact:
        raise ModelError(
            f"adapter.bias={adapter.bias}: bitsandbytes rounds the biases of quantized layers to "
            f"{dtype_name(packed)} in every step, so most steps would not change them. Set "
            "adapter.bias=none, quantization=none or model.dtype=float32"
        )


def _require_floating_point(model: PeftModel, modules_to_save: list[str], kind: str) -> None:
    """Refuse modules_to_save that a quantized base holds in 4 or 8 bits."""
    # Integer weights have no gradient: PEFT fails on them with a traceback
    inside = [f".{name}." for name in quantized_weights(model)]
    wrong = [wanted for wanted in modules_to_save if any(f".{wanted}." in name for name in inside)]
    if wrong:
        raise ModelError(
            f"adapter.modules_to_save={modules_to_save}: on a quantized base ({kind}) the weights of "
            f"{', '.join(wrong)} cannot be trained. Adapt them (target_modules), or set "
            "quantization=none"
        )


def _require_columns(model: PeftModel, *, quantized: bool) -> None:
    """Refuse OLoRA on weights that are transposed or have a side smaller than r."""
    # OLoRA uses r columns of a weight's QR decomposition. PEFT silently uses fewer if there are fewer
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module.get_base_layer(), Conv1D) and not quantized:
            raise ModelError(OLORA_ON_CONV1D)
        rank, narrow = max(module.r.values()), min(module.in_features, module.out_features)
        if rank > narrow:
            raise ModelError(
                f"adapter.init_lora_weights=olora: r={rank} is more than {narrow}, the smaller side "
                f"of {name.rpartition('.')[2]}. Choose a smaller r, or default or gaussian"
            )
