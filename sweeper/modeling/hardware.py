"""What this process computes on, and which dtype suits it. Knows nothing of models."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class ComputePrecision:
    """A dtype and why it was chosen."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}: {self.reason}"


@dataclass(frozen=True)
class DeviceReport:
    """The device of this process, in figures."""

    name: str
    capability: str
    """sm_80 and the like; for a CPU the units that compute bf16, if any."""
    bf16: bool
    """Computes in bf16 natively; an emulation does not count."""
    total_mib: float
    free_mib: float


def device() -> torch.device:
    """The device of this process: its one visible GPU, or the CPU (also on Apple silicon)."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_report(on: torch.device) -> DeviceReport:
    """Name, capability and memory of a device; a CPU's memory is what this process may use of it."""
    if on.type == "cuda":
        free, total = torch.cuda.mem_get_info(on)
        name, capability = str(torch.cuda.get_device_name(on)), _cuda_capability(on)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        memory = psutil.virtual_memory()
        limit = min((memory.total, *_limits()))
        free, total = min(memory.available, limit), limit
        units = _cpu_bf16_units()
        name, capability, bf16 = platform.processor() or "cpu", "/".join(units), bool(units)
    return DeviceReport(name, capability, bf16, total / 2**20, free / 2**20)


def choose_dtype(name: str, on: torch.device) -> ComputePrecision:
    """The dtype the forward pass computes in, and why.

    `auto` is bf16 where the GPU computes in it, fp16 on older CUDA, and fp32 on a CPU.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return ComputePrecision(dtype, f"model.dtype={name} asks for it")
    if on.type == "cuda":
        return _for_gpu(_cuda_capability(on))
    return _for_cpu(_cpu_bf16_units())


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _for_gpu(capability: str) -> ComputePrecision:
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
        "a loss on a CPU must not depend on which CPU it is; this one also computes bfloat16 "
        f"({'/'.join(units)}): model.dtype=bfloat16 is faster",
    )


def _limits() -> Iterator[float]:
    """Bytes that resource limits and control groups (version 2) leave to this process."""
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft
    for group in _control_groups():
        text = group.read_text(encoding="ascii").strip() if group.is_file() else "max"
        if text != "max":
            yield int(text)


def _control_groups(
    of: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Where the limits of this process's control group and of those around it stand."""
    lines = of.read_text(encoding="ascii").splitlines() if of.is_file() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    place = root / own
    return [place / "memory.max", *(around / "memory.max" for around in place.parents)]


def _cpu_bf16_units() -> tuple[str, ...]:
    known = torch.cpu.get_capabilities()
    names = {"AVX512_BF16": "avx512_bf16", "AMX": "amx_bf16", "BF16": "bf16"}
    return tuple(unit for unit, flag in names.items() if known.get(flag, False))


def _cuda_capability(on: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(on)
    return f"sm_{major}{minor}"
