"""Which of this machine's devices a worker computes on, decided before torch is imported."""

from __future__ import annotations

import os
import shutil
import subprocess

from sweeper.core.errors import WorkerError


def devices_of(worker: int, count: int) -> list[str | None]:
    """The GPUs of a worker, as CUDA_VISIBLE_DEVICES names them; None for each share of the CPUs.

    Where this process already sees just `count` (a cluster has chosen them), it has them all.

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
