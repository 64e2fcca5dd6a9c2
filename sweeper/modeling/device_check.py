"""Print what this machine can train with as one JSON line: devices, bf16, and a test of 4-bit layers.

`sweeper doctor` runs this module in a separate process (`python -m sweeper.modeling.device_check`),
because orchestration imports no torch, and because a broken CUDA library kills the process.
"""

from __future__ import annotations

import json
import math
import os

import psutil
import torch
from torch import nn

from sweeper.modeling.hardware import spills

MIB = 2**20


def check() -> dict[str, object]:
    """Return a description of each device: name, memory in MiB, bf16 support and problems with NF4."""
    return {"devices": [_describe(on) for on in _devices()]}


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def _describe(on: torch.device) -> dict[str, object]:
    if on.type == "cuda":
        free, total = torch.cuda.mem_get_info(on)
        name = torch.cuda.get_device_name(on)
        # torch's default counts a GPU that emulates bf16, such as a T4
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
        name = f"CPU, {os.cpu_count()} cores"
        bf16 = any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))
    return {
        "name": name,
        "type": on.type,
        "free_mib": free / MIB,
        "total_mib": total / MIB,
        "bf16": bool(bf16),
        "nf4": nf4_problem(on),
        "mps": torch.backends.mps.is_available(),
        "spills": on.type == "cuda" and spills(),
    }


def nf4_problem(on: torch.device) -> str | None:
    """Return why QLoRA cannot train on a device, or None if it can."""
    # A trainable layer below a frozen NF4 layer learns only if the gradient passes through the latter
    try:
        import bitsandbytes as bnb

        torch.manual_seed(0)
        frozen = bnb.nn.Linear4bit(
            64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        below = nn.Linear(64, 64)
        model = nn.Sequential(below, frozen).to(on)
        loss = model(torch.ones(4, 64, device=on)).pow(2).mean()
        loss.backward()
        gradient = below.weight.grad
        if gradient is None or not math.isfinite(float(gradient.norm())) or not gradient.any():
            return "no gradient passes through a 4-bit layer"
        return None
    except (
        ImportError,
        OSError,
        RuntimeError,
        ValueError,
        AssertionError,
        NotImplementedError,
    ) as error:
        return (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
        )


if __name__ == "__main__":
    print(json.dumps(check()))
