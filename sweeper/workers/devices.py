"""The choice of a worker's devices on this machine, made before torch is imported.

GPUs are named by UUID where nvidia-smi lists them, because an index depends on CUDA_DEVICE_ORDER and
cannot name a MIG instance. A build of torch that cannot use a GPU finds none here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sweeper.core.errors import WorkerError

SMI_SECONDS = 30.0
"""Time limit of nvidia-smi. A judgement: loading an idle driver takes seconds, and a broken one
hangs."""
WSL_SMI = Path("/usr/lib/wsl/lib/nvidia-smi")
"""The place of nvidia-smi under WSL2, which is not on every user's PATH."""
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
"""Linux's folder of AMD's compute devices. A node with simd_count 0 is a CPU."""
UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[^)\s]+)\)")
NAMED_DEVICE = re.compile(r"\d+|GPU-\S+|MIG-\S+")
NO_DEVICE = frozenset({"", "-1", "NoDevFiles"})
"""Entries of CUDA_VISIBLE_DEVICES by which users hide the GPUs after them."""

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names under which torch reads its allocator's configuration. torch 2.9 ignores the last for CUDA."""


@dataclass(frozen=True)
class DeviceSurvey:
    """The GPUs that processes of this machine may use."""

    names: tuple[str, ...] = ()
    """Each GPU as CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES names it. Empty: only the CPU."""
    problem: str = ""
    """Why GPUs that this machine seems to have are not used, or ''."""


def survey_devices(
    build: str | None = None, environment: Mapping[str, str] = os.environ
) -> DeviceSurvey:
    """Return the GPUs that a worker of this machine may use.

    Args:
        build: torch's version with its local part (2.11.0+cpu), or None for that of the installed one.
        environment: the variables that may restrict the choice.

    Raises:
        WorkerError: nvidia-smi does not answer.
    """
    local = (_torch_build() if build is None else build).partition("+")[2]
    if local.startswith(("cpu", "xpu")):
        return DeviceSurvey()
    # HIP reads CUDA's variable too, unless its own is set
    order = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    for variable in order if local.startswith("rocm") else order[1:]:
        if variable in environment:
            return parse_visible(variable, environment[variable])
    if local.startswith("rocm"):
        return _amd_devices(environment)
    return _nvidia_devices()


def parse_visible(variable: str, value: str) -> DeviceSurvey:
    """Return the GPUs that a variable names, as CUDA reads it: up to the first entry that names none."""
    names: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry in NO_DEVICE:
            break
        if NAMED_DEVICE.fullmatch(entry) is None:
            problem = (
                f"{variable}={value}: {entry!r} names no GPU, so CUDA ignores it and what follows"
            )
            return DeviceSurvey(tuple(names), problem)
        if entry in names:
            return DeviceSurvey((), f"{variable}={value}: CUDA shows no GPU if one is named twice")
        names.append(entry)
    return DeviceSurvey(tuple(names))


def parse_listing(listing: str) -> tuple[str, ...]:
    """Return the UUIDs of `nvidia-smi -L`: those of a GPU's MIG instances instead of its own."""
    names: list[str] = []
    for name in UUID.findall(listing):
        # CUDA cannot use a GPU that is split into instances, which are listed below it
        if name.startswith("MIG-") and names and names[-1].startswith("GPU-"):
            names.pop()
        names.append(name)
    return tuple(names)


def share_devices(survey: DeviceSurvey, workers: int, count: int) -> list[str]:
    """Return sentences about GPUs that are shared, idle or unusable, for workers of one machine.

    Args:
        survey: the machine's GPUs.
        workers: number of workers.
        count: GPUs of each worker.

    Raises:
        WorkerError: workers of several GPUs each would have GPUs in common.
    """
    have, words = len(survey.names), [survey.problem] if survey.problem else []
    if not have:
        return words
    if count > 1:
        _require_width(survey, count)
    if workers * count > have and count > 1:
        raise WorkerError(
            f"hydra.sweeper.n_jobs={workers * count} is {workers} workers of "
            f"training.devices_per_trial={count} GPUs each, and this machine shows {have} GPUs "
            f"({', '.join(survey.names)}). Set hydra.sweeper.n_jobs={have // count * count} or less"
        )
    if workers > have:
        words.append(
            f"{workers} workers share {have} {_gpus(have)}: workers on one GPU share its memory and "
            f"its speed. hydra.sweeper.n_jobs={have} gives each of them a GPU"
        )
    idle = have - workers * count
    if idle >= count:
        words.append(
            f"{idle} of {have} GPUs stay idle. hydra.sweeper.n_jobs={have // count * count} uses "
            f"{'all' if have % count == 0 else have // count * count} of them"
        )
    return words


def devices_of(worker: int, count: int, survey: DeviceSurvey | None = None) -> list[str | None]:
    """Return the GPUs of a worker as CUDA_VISIBLE_DEVICES names them, or None for shares of the CPUs.

    A worker gets all GPUs of a process that sees exactly `count`, because a cluster has chosen them.

    Raises:
        WorkerError: there are GPUs, but fewer than `count`, or MIG instances for a wide trial.
    """
    survey = survey_devices() if survey is None else survey
    found = survey.names
    if not found:
        return [None] * count
    _require_width(survey, count)
    # whole groups only: a group that wraps around would have GPUs in common with two others
    group = worker % (len(found) // count)
    return list(found[group * count : (group + 1) * count])


def see_devices(own: str | None, others: Sequence[str | None] = ()) -> None:
    """Let this process see its own GPU first, then those of the other ranks of its trials.

    NCCL connects two GPUs directly only if each process sees both.

    Args:
        own: the GPU of this process, which becomes its first one, or None for the CPU.
        others: the GPUs of the other ranks.
    """
    if own is None:
        return
    seen = ",".join([own, *(name for name in others if name is not None)])
    # CUDA's own order is the fastest GPU first, which nvidia-smi's indices do not follow
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen
    _reserve_in_segments()
    if "+rocm" in _torch_build():
        # where HIP's own variable is set, HIP does not read CUDA's
        os.environ["HIP_VISIBLE_DEVICES"] = seen


def _reserve_in_segments() -> None:
    """Let torch's allocator extend what it has reserved, unless the user has configured it."""
    # Trials of a warm worker differ in their batches, so blocks of fixed sizes fragment the memory.
    # WSL2's driver does not map memory in pieces
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES) and not WSL_SMI.exists():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def _require_width(survey: DeviceSurvey, count: int) -> None:
    found = survey.names
    if len(found) < count:
        raise WorkerError(
            f"training.devices_per_trial={count}: this machine shows {len(found)} {_gpus(len(found))} "
            f"({', '.join(found)})"
        )
    if count > 1 and any(name.startswith("MIG-") for name in found):
        raise WorkerError(
            f"training.devices_per_trial={count}: a process can use one MIG instance only, and NCCL "
            "connects none. Set training.devices_per_trial=1"
        )


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else "GPUs"


def _torch_build() -> str:
    """Return torch's version with its local part, without the seconds that an import takes."""
    try:
        return metadata.version("torch")
    # Built in place: assume a GPU, as for a build without label
    except metadata.PackageNotFoundError:
        return ""


def _nvidia_devices() -> DeviceSurvey:
    program = shutil.which("nvidia-smi") or (str(WSL_SMI) if WSL_SMI.exists() else None)
    if program is None:
        return DeviceSurvey()
    try:
        answer = subprocess.run(
            [program, "-L"], capture_output=True, text=True, check=False, timeout=SMI_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(
            f"{program} -L does not answer within {SMI_SECONDS:g} s. Name the GPUs to use with "
            "CUDA_VISIBLE_DEVICES=0,1 or none with CUDA_VISIBLE_DEVICES=''"
        ) from None
    except OSError as error:
        return DeviceSurvey(problem=f"{program} cannot be run ({error}). No GPU is used")
    names = parse_listing(answer.stdout)
    if answer.returncode == 0 and (names or "GPU " not in answer.stdout):
        return DeviceSurvey(names)
    lines = (answer.stdout + answer.stderr).strip().splitlines()
    said = lines[0] if lines else f"exit code {answer.returncode}"
    return DeviceSurvey(problem=f"no GPU is used, because nvidia-smi fails: {said}")


def _amd_devices(environment: Mapping[str, str]) -> DeviceSurvey:
    """Return AMD's GPUs by index. ROCR_VISIBLE_DEVICES hides GPUs below HIP, which counts the rest."""
    if "ROCR_VISIBLE_DEVICES" in environment:
        shown = parse_visible("ROCR_VISIBLE_DEVICES", environment["ROCR_VISIBLE_DEVICES"])
        # HIP numbers the devices that ROCR shows anew
        return DeviceSurvey(tuple(map(str, range(len(shown.names)))), shown.problem)
    files = KFD_NODES.glob("*/properties")
    gpus = sum("simd_count 0\n" not in file.read_text(encoding="ascii") for file in files)
    return DeviceSurvey(tuple(map(str, range(gpus))))
