"""Print what this machine can train with as one JSON line: devices, bf16, and tests of 4-bit layers
and of the 8-bit optimizer in the dtype that trials compute in.

`sweeper doctor` runs this module in a separate process (`python -m sweeper.modeling.device_check`),
because orchestration imports no torch, and because a broken CUDA library kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable

import psutil
import torch
from torch import nn

from sweeper.modeling.hardware import choose_dtype, dtype_name, spills

MIB = 2**20
WIDTH = 128
"""Width of the layers that are tried. With fewer than 4,096 weights AdamW8bit keeps states in fp32."""


def check() -> dict[str, object]:
    """Return a description of each device: name, memory in MiB, bf16, and problems with 4 and 8 bits."""
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
        "optimizer_8bit": optimizer_problem(on),
        "mps": torch.backends.mps.is_available(),
        "spills": on.type == "cuda" and spills(),
    }


def nf4_problem(on: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Return why QLoRA cannot train on a device, or None if it can.

    Args:
        on: the device.
        dtype: the compute dtype, or None for the one that trials on the device compute in.
    """
    compute = choose_dtype("auto", on).dtype if dtype is None else dtype
    return _problem_of(lambda: _train_below_nf4(on, compute))


def optimizer_problem(on: torch.device) -> str | None:
    """Return why the 8-bit optimizer of bitsandbytes cannot train on a device, or None if it can."""
    return _problem_of(lambda: _step_in_8_bit(on))


def _problem_of(trial: Callable[[], str | None]) -> str | None:
    try:
        return trial()
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


def _train_below_nf4(on: torch.device, compute: torch.dtype) -> str | None:
    # A trainable layer below a frozen NF4 layer learns only if the gradient passes through the latter
    import bitsandbytes as bnb

    torch.manual_seed(0)
    frozen = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=compute, quant_type="nf4")
    below = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(below, frozen).to(on)
    with torch.autocast(on.type, compute, enabled=compute != torch.float32):
        loss = model(torch.ones(4, WIDTH, device=on)).float().pow(2).mean()
    loss.backward()
    gradient = below.weight.grad
    if gradient is None or not math.isfinite(float(gradient.norm())) or not gradient.any():
        return f"no gradient passes through a 4-bit layer in {dtype_name(compute)}"
    return None


def _step_in_8_bit(on: torch.device) -> str | None:
    import bitsandbytes as bnb

    weight = nn.Parameter(torch.ones(WIDTH, WIDTH, device=on))
    optimizer = bnb.optim.AdamW8bit([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    if optimizer.state[weight]["state1"].dtype != torch.uint8:
        return "bitsandbytes keeps its states in 32 bits"
    # AdamW's first step is the learning rate in the direction of the gradient
    if not bool((weight < 1).all()) or not bool(weight.isfinite().all()):
        return "a step of the 8-bit optimizer does not lower the weights"
    return None


if __name__ == "__main__":
    print(json.dumps(check()))
