"""Load the base model as configured: where from, at which precision, quantized or not.

Knows nothing of adapters and training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub import snapshot_download
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sweeper.embedded import BASE_DIR
from sweeper.errors import ModelError
from sweeper.settings import EMBEDDED, Model, Quantization

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched from a hub: safe formats only."""


@dataclass(frozen=True)
class Base:
    """A loaded base model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """sha256 of the weight files."""
    compute_dtype: torch.dtype
    """What the forward pass computes in; weights that are trained are held in fp32 all the same."""


def device() -> torch.device:
    """The device of this process: its one visible GPU, or the CPU (also on Apple silicon)."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(name: str, on: torch.device) -> torch.dtype:
    """`auto`: bf16 where the GPU computes in it, fp16 on older CUDA, fp32 elsewhere."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if on.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def base_folder(settings: Model) -> Path:
    """The local folder of the base model; a hub id is fetched into the hub's cache first.

    Raises:
        ModelError: neither a folder nor a hub id that can be fetched.
    """
    if settings.base_model == EMBEDDED:
        return BASE_DIR
    path = Path(settings.base_model).expanduser()
    if path.is_dir():
        return path
    try:
        fetched = snapshot_download(
            settings.base_model, revision=settings.revision, allow_patterns=list(WEIGHTS)
        )
    except (
        Exception
    ) as error:  # huggingface_hub, requests and OS errors alike: all mean "not there"
        raise ModelError(
            f"model.base_model={settings.base_model!r} is no local folder, and the hub did not give "
            f"it ({type(error).__name__}: {str(error).splitlines()[0]}); give a folder, or a hub id "
            "on a machine with a network"
        ) from error
    return Path(fetched)


def weights_digest(folder: Path) -> str:
    """sha256 over the safetensors files of a folder, by name."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors weights (other formats can run code)")
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def load_base(settings: Model, quantization: Quantization, *, trained: bool) -> Base:
    """Load weights and tokenizer onto this process's device.

    Args:
        settings: which model, and at which dtype a frozen base is held.
        quantization: 4-bit or not; a quantized base is prepared for training adapters on it.
        trained: the base's own weights will be trained, so they are held in fp32 (master weights).

    Raises:
        ModelError: the folder holds no causal language model that transformers can load.
    """
    folder = base_folder(settings)
    on = device()
    compute_dtype = resolve_dtype(settings.dtype, on)
    dtype = torch.float32 if trained else compute_dtype
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attn_implementation}
    if quantization.load_in_4bit:
        options["quantization_config"] = _bits_and_bytes(quantization, dtype, on)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": on}, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.base_model={settings.base_model!r}: {reason}") from error
    if quantization.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_gradient(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(model, tokenizer, weights_digest(folder), compute_dtype)


def _bits_and_bytes(
    quantization: Quantization, dtype: torch.dtype, on: torch.device
) -> BitsAndBytesConfig:
    name = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if name == "auto" else resolve_dtype(name, on),
    )


def keep_gradient(model: PreTrainedModel) -> None:
    """Switch off bitsandbytes' inference-only repacking of 4-bit weights on CPUs with AVX512_BF16.

    bitsandbytes 0.50.2 repacks at the first forward in eval mode; afterwards training steps carry no
    gradient through the base, in silence.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
