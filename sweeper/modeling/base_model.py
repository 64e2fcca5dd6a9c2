"""Load the base model with the configured precision and quantization.

Independent of adapters and training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sweeper.config.settings import ModelSettings, QuantizationSettings
from sweeper.core.device_failures import breaks_context, means_out_of_memory
from sweeper.core.errors import ModelError, SweeperError, first_line
from sweeper.data.token_cache import tokenizer_digest
from sweeper.modeling import quantized_cache
from sweeper.modeling.expert_weights import every_linear_weight, quantized_share
from sweeper.modeling.fit_of_base import fit_tokens, require_causal
from sweeper.modeling.hardware import choose_dtype, dtype_name
from sweeper.modeling.hardware import device as device  # training takes it from here
from sweeper.modeling.held_precision import hold_frozen
from sweeper.modeling.model_source import (
    NO_CODE,
    config_digest,
    find_source,
    in_full,
    load_tokenizer,
    weights_bytes,
    weights_digest,
)
from sweeper.modeling.padding_proof import confine_to_rows, padding_obstacle


@dataclass(frozen=True)
class LoadedBase:
    """A loaded base model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """sha256 of the weight files."""
    config_digest: str
    """sha256 of the configuration."""
    commit: str | None
    """The hub's commit hash of the files, or None for files that are not from the hub."""
    compute_dtype: torch.dtype
    """Dtype of the forward pass. Trained weights are always fp32."""
    dtype_reason: str
    """Reason for the dtype as text, such as "bfloat16: the GPU (sm_80) computes in it"."""
    padded_because: str | None
    """Reason why the model's batches are padded, or None if they have no padding."""
    remarks: tuple[str, ...] = ()
    """Sentences on what loading had to change, or could not do as asked."""
    quantized_share: float | None = None
    """Quantized weights as a share of the linear ones without the head, or None without quantization."""

    @cached_property
    def tokenizer_digest(self) -> str:
        """The sha256 of the tokenizer with its chat template."""
        return tokenizer_digest(self.tokenizer)


def load_base(
    settings: ModelSettings, quantization: QuantizationSettings, *, trained: bool
) -> LoadedBase:
    """Load weights and tokenizer onto this process's device.

    Args:
        settings: the model, and the dtype of a frozen base.
        quantization: 4-bit, 8-bit or none. A quantized base is prepared for training adapters.
        trained: True if the base's own weights will be trained, so they must be fp32 (master weights).

    Raises:
        ModelError: the model does not exist, or transformers cannot load it as a causal language model.
    """
    source = find_source(settings)
    on = device()
    precision = choose_dtype(settings.dtype, on)
    dtype = torch.float32 if trained else precision.dtype
    where = f"model.base_model={settings.base_model!r}"
    digest, configured = weights_digest(source.folder), config_digest(source.folder)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.requested_attention}
    tokenizer = load_tokenizer(source.folder, where)
    try:
        if quantization.kind == "none":
            model = _load(source.folder, settings, options)
        else:
            digests = (digest, configured)
            model = _quantized(source.folder, settings, quantization, options, digests)
    except (SweeperError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # files of somebody else may contradict each other in any way
        # The CPU's own out of memory is a result, and a broken GPU says nothing about the model
        if means_out_of_memory(str(error)) or breaks_context(error):
            raise
        raise ModelError(_contradiction(settings, error)) from error
    # The digests stand for what was loaded, so the files must not change in between
    if (weights_digest(source.folder), config_digest(source.folder)) != (digest, configured):
        raise ModelError(f"{where}: its files were changed while they were loaded")
    complete_tokenizer(tokenizer, model, settings)
    remarks = [*_attention_remark(settings, model), *fit_tokens(tokenizer, model, where)]
    share = None
    if quantization.kind != "none":
        share = quantized_share(model, where, quantization.kind)
        remarks += share.remarks(quantization.kind)
    if quantization.kind != "int8":  # its outliers are decided over all tokens of a batch
        _require_computing(model, where, quantization.kind)
    obstacle = padding_obstacle(model)
    if obstacle is None:
        confine_to_rows(model)
    return LoadedBase(
        model,
        tokenizer,
        digest,
        configured,
        source.commit,
        precision.dtype,
        str(precision),
        obstacle,
        tuple(remarks),
        None if share is None else share.share,
    )


def _require_computing(model: PreTrainedModel, where: str, kind: str) -> None:
    """Check that a model computes, and reads text in one direction.

    Raises:
        ModelError: its class cannot compute with these weights, or see `require_causal`.
    """
    try:
        require_causal(model, where)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SweeperError) or means_out_of_memory(str(error)):
            raise
        if breaks_context(error):
            raise
        # Mamba multiplies with a projection's weight itself, which is packed bytes in NF4
        packed = kind != "none"
        remedy = " Its class may need unpacked weights: quantization=none" if packed else ""
        raise ModelError(
            f"{where}: {type(model).__name__} does not compute: {first_line(error).rstrip('.')}."
            f"{remedy}"
        ) from error


def _attention_remark(settings: ModelSettings, model: PreTrainedModel) -> list[str]:
    """Say which attention was chosen, unless it is the usual one."""
    chosen = model.config._attn_implementation
    if settings.attn_implementation != "auto" or chosen != "eager":
        return []
    return [f"{type(model).__name__} has no sdpa attention, so its attention is eager"]


def _contradiction(settings: ModelSettings, error: Exception) -> str:
    where = f"model.base_model={settings.base_model!r}"
    if "ignore_mismatched_sizes" in str(error):
        return f"{where}: its weights have other shapes than its config.json says"
    return in_full(where, error)


def _load(folder: Path, settings: ModelSettings, options: dict[str, Any]) -> PreTrainedModel:
    with every_linear_weight():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": device()},  # the whole model on one device, also when memory is short
            output_loading_info=True,
            use_safetensors=True,
            **NO_CODE,
            **options,
        )
    _require_all_weights(report, settings)
    loaded: PreTrainedModel = model
    return loaded


def _quantized(
    folder: Path,
    settings: ModelSettings,
    quantization: QuantizationSettings,
    options: dict[str, Any],
    digests: tuple[str, str],
) -> PreTrainedModel:
    """Return a quantized base prepared for adapters, from the cache if that is faster."""
    config = bits_and_bytes(quantization, options["dtype"], device())

    def quantize() -> PreTrainedModel:
        return _load(folder, settings, {**options, "quantization_config": config})

    def load(entry: Path) -> PreTrainedModel:
        model = _load(entry, settings, options)
        # The model card reads the base's licence from the original folder, not from the cache
        model.name_or_path = model.config.name_or_path = str(folder)
        return model

    if weights_bytes(folder) < quantized_cache.SMALLEST_BYTES:
        model = quantize()
    else:
        # The full configuration, so a changed default of transformers changes the key
        decided = config.to_json_string(use_diff=False)
        key = quantized_cache.QuantizationKey(
            *digests, decided, dtype_name(options["dtype"]), device().type
        )
        model = quantized_cache.quantized_once(key, quantized_cache.cache_folder(), quantize, load)
    model.requires_grad_(False)
    packed = {
        id(parameter)
        for parameter in model.parameters()
        if isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params)
    }
    hold_frozen(model, options["dtype"], packed)
    if device().type == "cuda":
        torch.cuda.empty_cache()  # what the converted weights occupied before
    disable_inference_repacking(model)
    return model


def bits_and_bytes(
    quantization: QuantizationSettings, dtype: torch.dtype, on: torch.device
) -> BitsAndBytesConfig:
    """Return transformers' quantization configuration.

    Args:
        quantization: the settings, with load_in_4bit or load_in_8bit.
        dtype: compute dtype of 4-bit layers if the settings say auto.
        on: the device.
    """
    if quantization.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    name = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if name == "auto" else choose_dtype(name, on).dtype,
    )


def disable_inference_repacking(model: PreTrainedModel) -> None:
    """Switch off bitsandbytes' inference-only repacking of 4-bit weights on CPUs with AVX512_BF16."""
    # bitsandbytes 0.50.2 repacks the weights at the first forward pass in eval mode. Later training
    # steps then silently pass no gradient through the base
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def complete_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: ModelSettings
) -> None:
    """Give a tokenizer an end-of-text token (from the model's configuration) and a padding token.

    Raises:
        ModelError: neither the tokenizer nor the model names an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        known = [model.generation_config and model.generation_config.eos_token_id]
        known.append(getattr(model.config, "eos_token_id", None))
        named = next((found for found in known if found is not None), None)
        token_id = named[0] if isinstance(named, list) else named
        token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            raise ModelError(
                f"model.base_model={settings.base_model!r}: neither its tokenizer nor its "
                "configuration names an end-of-text token, so no answer could ever end. "
                "Set eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe, because padding is masked and has no loss


def _require_all_weights(report: dict[str, Any], settings: ModelSettings) -> None:
    """Raise if transformers' loading report lists missing weights or weights of another shape."""
    # transformers initialises them at random and continues with a warning
    missing = sorted(str(name) for name in (*report["missing_keys"], *report["mismatched_keys"]))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"model.base_model={settings.base_model!r}: its files lack the weights "
            f"{', '.join(missing[:3])}{more} that its configuration requires"
        )
