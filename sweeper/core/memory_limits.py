"""The memory that this process may use: its machine's, its control groups', its resource limits'."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil


def usable_memory() -> tuple[float, float]:
    """Return the bytes that this process may use in all, and those of them that are free now."""
    memory = psutil.virtual_memory()
    limit = min((memory.total, *_limits()))
    return limit, min(memory.available, limit)


def _limits() -> Iterator[float]:
    """Yield the memory limits of this process in bytes: resource limits and control groups (v2)."""
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft
    for group in control_groups():
        limit = group / "memory.max"
        text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
        if text != "max":
            yield int(text)


def control_groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Return the folders of this process's control group (v2) and of its parents."""
    lines = membership.read_text(encoding="ascii").splitlines() if membership.is_file() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    group = root / own
    return [group, *group.parents]
