"""Find the GPUs that other processes use, so that a study's workers take the others first."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sweeper.workers.devices import SMI_SECONDS, WSL_SMI, DeviceSurvey

UNSEEN_MIB = 1024.0
"""Memory in use above which a GPU counts as taken although no process on it is listed: those of other
containers are not. A driver keeps less than this for itself."""


def users_of(names: Sequence[str]) -> dict[str, str]:
    """Return the GPUs among these that other processes use, each with what uses it.

    Without nvidia-smi, as on AMD's GPUs, none is known to be used.
    """
    program = shutil.which("nvidia-smi") or (str(WSL_SMI) if WSL_SMI.exists() else None)
    if program is None or not names:
        return {}
    gpus = _answer(program, "--query-gpu=index,uuid,memory.used")
    processes = _answer(program, "--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
    return parse_use(names, gpus, processes)


def parse_use(names: Sequence[str], gpus: str, processes: str) -> dict[str, str]:
    """Return the users of GPUs from nvidia-smi's two tables (CSV without a header).

    Args:
        names: GPUs as CUDA_VISIBLE_DEVICES names them: index, UUID, or the begin of a UUID.
        gpus: index, UUID and memory in use of each GPU.
        processes: UUID of the GPU or MIG instance, PID, name and memory of each process.
    """
    uses: dict[str, str] = {}
    indices: dict[str, str] = {}
    for index, uuid, used in _rows(gpus, 3):
        indices[index] = uuid
        mib = used.split()[0]
        if mib.isdigit() and int(mib) >= UNSEEN_MIB:
            uses[uuid] = f"{used} in use"
    # after the memory in use, because the name of a process says more
    for uuid, pid, name, used in _rows(processes, 4):
        uses[uuid] = f"process {pid} ({name.rpartition('/')[2]}) holds {used}"
    return {name: use for name in names if (use := _use_of(indices.get(name, name), uses))}


def free_first(survey: DeviceSurvey, used: Mapping[str, str]) -> DeviceSurvey:
    """Return a survey with the GPUs that nothing uses in front, so that workers are given those."""
    # the sort is stable: otherwise the GPUs keep their order
    return replace(survey, names=tuple(sorted(survey.names, key=lambda name: name in used)))


def _use_of(name: str, uses: Mapping[str, str]) -> str | None:
    return next((use for uuid, use in uses.items() if uuid.startswith(name)), None)


def _rows(table: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return [row for row in rows if len(row) == columns]


def _answer(program: str, query: str) -> str:
    """Return a table of nvidia-smi, or '' if it cannot make one: the GPUs count as free then."""
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
