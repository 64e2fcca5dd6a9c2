"""The number of devices and CPU threads that a study uses, chosen once and stored with the study.

A rule chooses, not a measurement: that would load the base twice, and the load of the machine in one
minute would decide the number for all nights. What the rule is based on was measured once
(benchmarks/engines.json): two workers of one thread are 1.48 times as fast as one of two threads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import EMBEDDED, LoraAdapter, TrialSettings, WorkerSettings
from sweeper.core.memory_limits import control_groups, usable_memory
from sweeper.workers.device_use import users_of
from sweeper.workers.devices import DeviceSurvey, survey_devices

JobCount = int | Literal["auto"]

PROCESS_MIB = 1200.0
"""Memory of a worker with its libraries, data and caches, besides what grows with the model."""
FULL_BYTES = 20.0
"""Bytes for each parameter of a full fine-tune: weight, gradient, two moments, and the weight's copy."""
BASE_BYTES = 6.0
"""Bytes for each parameter of a base with an adapter: its largest dtype, and what is loaded from."""
TRIALS_PER_WORKER = 4
"""Trials of an arm for each CPU worker at least, because the search learns that many places later."""


@dataclass(frozen=True)
class WorkerCount:
    """The devices that a study uses at the same time."""

    jobs: int
    """Number of devices: shares of the CPU, or GPUs."""
    threads: int
    """CPU threads of each process."""
    reason: str

    def __str__(self) -> str:
        threads = "thread" if self.threads == 1 else "threads"
        return f"n_jobs={self.jobs} with {self.threads} CPU {threads} each: {self.reason}"

    def stored(self) -> dict[str, int]:
        """Return the form that is stored with the study."""
        return {"jobs": self.jobs, "threads": self.threads}


@dataclass(frozen=True)
class MachineShare:
    """The part of this machine that this process may use."""

    cores: int
    free_mib: float
    devices: DeviceSurvey
    used: Mapping[str, str]
    """GPUs that other processes use, each with its use."""


def this_machine() -> MachineShare:
    """Return the share of this process."""
    survey = survey_devices()
    _, free = usable_memory()
    return MachineShare(usable_cores(), free / 2**20, survey, users_of(survey.names))


def usable_cores() -> int:
    """Return the number of CPU cores of this process: its affinity, and its control groups' quota."""
    # macOS has no affinity
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores or 1, *_quotas()]))


def count_workers(
    wanted: JobCount,
    stored: Mapping[str, int] | None,
    *,
    begun: bool,
    workers: WorkerSettings,
    arms: Sequence[tuple[TrialSettings, int]],
    machine: Callable[[], MachineShare] = this_machine,
) -> WorkerCount:
    """Return the number of devices that a study uses.

    Args:
        wanted: n_jobs as it was given.
        stored: the stored form of an earlier run's count, if there is one.
        begun: True if the study has been run before.
        workers: the engine and the trainer.
        arms: each arm's settings and its number of trials.
        machine: looks at this machine, if that is necessary.
    """
    if wanted != "auto":
        threads = _threads(wanted)
        if stored is not None and stored["jobs"] == wanted:
            threads = stored["threads"]
        return WorkerCount(wanted, threads, "given")
    if stored is not None:
        return WorkerCount(stored["jobs"], stored["threads"], "as in this study's first run")
    if begun:
        # the default of the versions that stored no number
        return WorkerCount(
            1, _threads(1), "as in this study's earlier runs, which stored no number"
        )
    if workers.engine == "inline":
        return WorkerCount(1, _threads(1), "workers.engine=inline has one worker")
    if workers.trainer == "fake":
        return WorkerCount(1, _threads(1), "the fake trainer uses no device")
    if workers.address is not None:
        return WorkerCount(
            1, 1, "auto looks at this machine only; for a cluster give the number of its devices"
        )
    return _fitting(machine(), arms)


def _fitting(machine: MachineShare, arms: Sequence[tuple[TrialSettings, int]]) -> WorkerCount:
    if machine.devices.names:
        return _on_gpus(machine, arms)
    trials = max(count for _, count in arms)
    need = max((needed_mib(settings) for settings, _ in arms), key=_unknown_last)
    if need is None:
        return WorkerCount(
            1, machine.cores, "the base model's size is not known before its download"
        )
    limits = {
        f"{machine.cores} CPU cores": machine.cores,
        f"{machine.free_mib:,.0f} MiB of memory for about {need:,.0f} MiB each": int(
            machine.free_mib / need
        ),
        f"one for each {TRIALS_PER_WORKER} of {trials} trials": trials // TRIALS_PER_WORKER,
    }
    jobs = max(1, min(limits.values()))
    reason = next(words for words, most in limits.items() if max(1, most) == jobs)
    return WorkerCount(jobs, 1 if jobs > 1 else machine.cores, reason)


def _on_gpus(machine: MachineShare, arms: Sequence[tuple[TrialSettings, int]]) -> WorkerCount:
    names = machine.devices.names
    free = [name for name in names if name not in machine.used]
    widths = [settings.training.devices_per_trial for settings, _ in arms]
    most = max(count * width for (_, count), width in zip(arms, widths, strict=True))
    jobs = max(min(len(free), most), *widths)
    words = f"{len(free)} of {len(names)} visible GPUs are free"
    if machine.used:
        taken = "; ".join(f"{name}: {use}" for name, use in machine.used.items())
        words += f", left out are {taken}"
    if most < len(free):
        words += f", and {most} are enough for all trials"
    return WorkerCount(jobs, max(1, machine.cores // jobs), words)


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _unknown_last(need: float | None) -> float:
    return math.inf if need is None else need


def needed_mib(settings: TrialSettings) -> float | None:
    """Return the MiB that a worker needs about, or None if the base model is not on this machine."""
    name = settings.model.base_model
    folder = BASE_DIR if name == EMBEDDED else Path(name)
    found = parameters_in(folder.glob("*.safetensors")) if folder.is_dir() else None
    if not found:
        return None
    each = BASE_BYTES if isinstance(settings.adapter, LoraAdapter) else FULL_BYTES
    return PROCESS_MIB + (found * each + _logit_bytes(settings, folder)) / 2**20


def _logit_bytes(settings: TrialSettings, folder: Path) -> float:
    """Return the bytes of a batch's logits, their gradient and the softmax, which outweigh the rest."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
    # max_length=auto follows from the tokenized rows, which are not there yet
    length = settings.data.max_length if isinstance(settings.data.max_length, int) else 512
    rows = settings.training.per_device_train_batch_size
    # three fp32 tensors of 4 bytes
    return 12.0 * rows * length * float(config.get("vocab_size", 0))


def parameters_in(files: Iterable[Path]) -> int | None:
    """Return the number of parameters in safetensors files by their headers, or None if one has none."""
    count = 0
    for path in files:
        with path.open("rb") as stream:
            try:
                # a safetensors file begins with the length of its JSON header, in eight bytes
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                tensors = [each for name, each in header.items() if name != "__metadata__"]
                count += sum(math.prod(tensor["shape"]) for tensor in tensors)
            except (ValueError, KeyError, AttributeError, OverflowError, MemoryError):
                return None  # the worker that loads the file says what is wrong with it
    return count


def _quotas() -> list[int]:
    """Return the CPU cores that the control groups of this process allow, rounded down."""
    found: list[int] = []
    for group in control_groups():
        file = group / "cpu.max"
        # cgroup v2: a quota, or the word max, and its period, both in microseconds
        words = file.read_text(encoding="ascii").split() if file.is_file() else ["max"]
        if words[0] != "max":
            found.append(int(words[0]) // int(words[1]))
    return found
