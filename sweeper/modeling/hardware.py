"""Describe the device of this process and choose a dtype for it. Independent of models."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from sweeper.core.errors import WorkerError
from sweeper.core.memory_limits import usable_memory


@dataclass(frozen=True)
class ComputePrecision:
    """A dtype and the reason for its choice."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}: {self.reason}"


@dataclass(frozen=True)
class DeviceReport:
    """Name, capability and memory of a device."""

    name: str
    capability: str
    """Compute capability of a GPU (such as sm_80), or a CPU's units that compute bf16."""
    bf16: bool
    """True if the device computes in bf16 natively, without emulation."""
    total_mib: float
    free_mib: float


def device() -> torch.device:
    """Return the device of this process: its one visible GPU, or the CPU (also on Apple silicon)."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def prepare_device(assigned: str | None) -> None:
    """Make sure that this process computes on the GPU that it was assigned, within that GPU's memory.

    Args:
        assigned: the GPU's name in CUDA_VISIBLE_DEVICES, or None for the CPU.

    Raises:
        WorkerError: torch does not find the GPU. It would train on the CPU without a word.
    """
    on = device()
    if assigned is not None and on.type != "cuda":
        raise WorkerError(
            f"torch {torch.__version__} cannot use GPU {assigned}: python -m sweeper doctor shows what "
            "torch finds. CUDA_VISIBLE_DEVICES='' trains on the CPU"
        )
    if on.type == "cuda" and spills():
        # Without a cap an allocation beyond the GPU succeeds in system memory, ten times slower
        free, total = torch.cuda.mem_get_info(on)
        torch.cuda.set_per_process_memory_fraction(free / total, on)


def spills(release: str = platform.release()) -> bool:
    """Return True if the GPU's driver moves memory into the system's instead of refusing (WSL2)."""
    return "microsoft" in release.lower()


def device_report(on: torch.device) -> DeviceReport:
    """Return the report of a device. A CPU's memory is the amount that this process may use."""
    free: float
    total: float
    if on.type == "cuda":
        free, total = torch.cuda.mem_get_info(on)
        name, capability = str(torch.cuda.get_device_name(on)), _cuda_capability(on)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        total, free = usable_memory()
        units = _cpu_bf16_units()
        name, capability, bf16 = platform.processor() or "cpu", "/".join(units), bool(units)
    return DeviceReport(name, capability, bf16, total / 2**20, free / 2**20)


def choose_dtype(name: str, on: torch.device) -> ComputePrecision:
    """Return the dtype of the forward pass, with a reason.

    `auto` is bf16 on GPUs that support it natively, fp16 on other GPUs and fp32 on a CPU.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return ComputePrecision(dtype, f"set by model.dtype={name}")
    if on.type == "cuda":
        return _for_gpu(_cuda_capability(on))
    return _for_cpu(_cpu_bf16_units())


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _for_gpu(capability: str) -> ComputePrecision:
    # torch says by default that a T4 supports bf16, because it emulates bf16 there
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return ComputePrecision(torch.bfloat16, f"the GPU ({capability}) computes in it")
    return ComputePrecision(
        torch.float16, f"the GPU ({capability}) does not compute in bfloat16 but emulates it"
    )


def _for_cpu(units: tuple[str, ...]) -> ComputePrecision:
    if not units:
        return ComputePrecision(
            torch.float32, "this CPU has no AVX512_BF16 or AMX to compute bfloat16 in"
        )
    return ComputePrecision(
        torch.float32,
        "losses must not depend on the CPU model. This CPU also computes bfloat16 "
        f"({'/'.join(units)}), so model.dtype=bfloat16 would be faster",
    )


def _cpu_bf16_units() -> tuple[str, ...]:
    known = torch.cpu.get_capabilities()
    names = {"AVX512_BF16": "avx512_bf16", "AMX": "amx_bf16", "BF16": "bf16"}
    return tuple(unit for unit, flag in names.items() if known.get(flag, False))


def _cuda_capability(on: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(on)
    return f"sm_{major}{minor}"
