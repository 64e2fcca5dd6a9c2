"""Merge an adapter into its base: one model that needs no PEFT. Knows folders, not trials."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.core.errors import ModelError
from sweeper.modeling.model_source import NO_CODE, one_line, refuse_foreign, require_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MergeDtype = Literal["float32", "bfloat16", "float16"]


def merge(base_folder: Path, adapter_folder: Path, out: Path, dtype: MergeDtype) -> None:
    """Save base + adapter as one model in `out`: safetensors, configuration and tokenizer.

    The base is loaded in 16 or 32 bits, whatever it was held in while the adapter was trained: an
    adapter's update is smaller than the step between two 4-bit values, so merging into a 4-bit base
    throws the training away. After QLoRA the merged weights are W16 + delta where training saw
    W4 + delta: evaluate the merged model again.

    Args:
        base_folder: the unquantized base in transformers' layout.
        adapter_folder: what PEFT's save_pretrained wrote; its tokenizer is taken if it has one.
        out: a folder that does not exist yet, or is empty.
        dtype: of the merged weights.

    Raises:
        ModelError: the base is quantized, the adapter does not fit it, or `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is in use: merge into a new folder, or remove it first")
    refuse_foreign(base_folder, str(base_folder))
    if not (adapter_folder / "adapter_config.json").exists():
        raise ModelError(f"{adapter_folder} holds no adapter: no adapter_config.json in it")
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
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(out)


def _merged(base_folder: Path, adapter_folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=dtype, use_safetensors=True, **NO_CODE
    )
    try:
        model = PeftModel.from_pretrained(base, str(adapter_folder))
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except RuntimeError as error:  # torch's word for shapes that differ
        if "size mismatch" not in str(error):
            raise
        message = f"{adapter_folder} was not trained on {base_folder}: their shapes differ"
        raise ModelError(message) from error
    return merged


def _with_tokenizer(*folders: Path) -> Path:
    """The first folder that holds a tokenizer; the last one if none does."""
    return next((f for f in folders if (f / "tokenizer_config.json").exists()), folders[-1])
