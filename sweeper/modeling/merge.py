"""Merge an adapter into its base to get one model that needs no PEFT. Works on folders, not trials."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sweeper.core.errors import ModelError
from sweeper.core.trained_form import TRAINED_FORM
from sweeper.modeling.model_source import (
    NO_CODE,
    one_line,
    require_safetensors,
    require_unquantized_base,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION = "generation_config.json"
MergeDtype = Literal["float32", "bfloat16", "float16"]


def merge(base_folder: Path, adapter_folder: Path, out: Path, dtype: MergeDtype) -> None:
    """Save base + adapter as one model in `out`: safetensors, configuration and tokenizer.

    After QLoRA the merged weights are W16 + delta, but training used W4 + delta, so evaluate the merged
    model again.

    Args:
        base_folder: folder of the unquantized base in transformers' layout.
        adapter_folder: folder that PEFT's save_pretrained wrote. Its tokenizer and generation config
            are preferred.
        out: a folder that does not exist yet, or is empty.
        dtype: dtype of the merged weights.

    Raises:
        ModelError: the base is quantized, the adapter does not fit it, or `out` is in use.
    """
    # Never into a 4-bit base: an adapter's update is smaller than the step between two 4-bit values,
    # so merging would discard the training
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is in use. Merge into a new folder, or remove this one first")
    require_unquantized_base(base_folder, str(base_folder))
    if not (adapter_folder / "adapter_config.json").exists():
        raise ModelError(f"{adapter_folder} contains no adapter: adapter_config.json is missing")
    for folder in (base_folder, adapter_folder):
        require_safetensors(folder, str(folder))
    try:
        model = _merged(base_folder, adapter_folder, getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(
            _with_tokenizer(adapter_folder, base_folder), **NO_CODE
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(one_line(f"{adapter_folder} into {base_folder}", error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    # what a killed process has left
    shutil.rmtree(partial, ignore_errors=True)
    if (adapter_folder / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(adapter_folder)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if (adapter_folder / TRAINED_FORM).exists():
        shutil.copy2(adapter_folder / TRAINED_FORM, partial / TRAINED_FORM)
    partial.replace(out)  # atomic, so `out` never holds half a model


def _merged(base_folder: Path, adapter_folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=dtype, use_safetensors=True, **NO_CODE
    )
    try:
        model = PeftModel.from_pretrained(base, str(adapter_folder))
        # safe_merge refuses weights that become NaN
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except RuntimeError as error:  # torch has no exception class for different shapes
        if "size mismatch" not in str(error):
            raise
        message = f"{adapter_folder} was not trained on {base_folder}: their shapes differ"
        raise ModelError(message) from error
    return merged


def _with_tokenizer(*folders: Path) -> Path:
    """Return the first folder that contains a tokenizer, or the last folder if none does."""
    return next((f for f in folders if (f / "tokenizer_config.json").exists()), folders[-1])
