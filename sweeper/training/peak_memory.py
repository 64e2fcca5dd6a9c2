"""Measure the peak memory of one trial in a process that runs many trials."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Reset the peak: CUDA's allocator statistics, or the kernel's high-water mark (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # proc(5): resets VmHWM to the current resident size


def peak_mib() -> float:
    """Return the peak since `reset_peak` in MiB: allocated on the GPU, else resident in this process.

    Return the current resident size, a lower bound, on systems without /proc (macOS).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        # in proc(5) a kB has 1024 bytes
        return int(fields["VmHWM"].split()[0]) / 1024
    return float(psutil.Process().memory_info().rss) / 2**20
