"""The choice of a worker's devices on this machine, made before torch is imported."""

from __future__ import annotations

import os
import shutil
import subprocess

from sweeper.core.errors import WorkerError


def devices_of(worker: int, count: int) -> list[str | None]:
    """Return the GPUs of a worker as CUDA_VISIBLE_DEVICES names them, or None for shares of the CPUs.

    A worker gets all GPUs of a process that sees exactly `count`, because a cluster has chosen them.

    Raises:
        WorkerError: there are GPUs, but fewer than `count`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = visible.split(",") if visible is not None else _installed_gpus()
    if not any(found):
        return [None] * count
    if len(found) < count:
        raise WorkerError(
            f"training.devices_per_trial={count}: this machine shows {len(found)} GPUs "
            f"({', '.join(found)})"
        )
    first = worker * count if len(found) > count else 0
    return [found[(first + index) % len(found)] for index in range(count)]


def see_only(device: str | None) -> None:
    """Let this process see one GPU only.

    transformers would otherwise spread one trial over every GPU it sees (torch.nn.DataParallel).
    """
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device


def _installed_gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return answer.stdout.split()
