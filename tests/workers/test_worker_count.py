"""How many workers a study has, and the reason that is printed with the number."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from sweeper.workers.device_use import free_first, parse_use
from sweeper.workers.devices import DeviceSurvey
from sweeper.workers.worker_count import (
    JobCount,
    MachineShare,
    WorkerCount,
    count_workers,
    parameters_in,
)
from tests.conftest import make_settings

_settings = functools.cache(lambda *overrides: make_settings("workers=local", *overrides))
TWO_CORES = MachineShare(2, 24_000.0, DeviceSurvey(), {})
GPUS = ("GPU-aa", "GPU-bb", "GPU-cc")


def _count(
    machine: MachineShare = TWO_CORES,
    *overrides: str,
    wanted: JobCount = "auto",
    stored: Mapping[str, int] | None = None,
    begun: bool = False,
    n_trials: int = 12,
) -> WorkerCount:
    settings, full = _settings(*overrides), _settings("adapter=none", "quantization=none")
    arms = [(settings.trial, n_trials), (full.trial, 5)]
    return count_workers(
        wanted, stored, begun=begun, workers=settings.workers, arms=arms, machine=lambda: machine
    )


@pytest.mark.parametrize(
    ("machine", "n_trials", "jobs", "threads", "words"),
    [
        (TWO_CORES, 12, 2, 1, "2 CPU cores"),
        (MachineShare(1, 24_000.0, DeviceSurvey(), {}), 12, 1, 1, "1 CPU cores"),
        (MachineShare(16, 64_000.0, DeviceSurvey(), {}), 12, 3, 1, "one for each 4 of 12 trials"),
        (MachineShare(16, 64_000.0, DeviceSurvey(), {}), 100, 16, 1, "16 CPU cores"),
        (MachineShare(16, 3_500.0, DeviceSurvey(), {}), 100, 2, 1, "3,500 MiB of memory"),
        (MachineShare(16, 100.0, DeviceSurvey(), {}), 100, 1, 16, "100 MiB of memory"),
        (MachineShare(8, 9e4, DeviceSurvey(GPUS), {}), 12, 3, 2, "3 of 3 visible GPUs are free"),
        (
            MachineShare(8, 9e4, DeviceSurvey(GPUS), {"GPU-bb": "process 7 (python) holds 9 MiB"}),
            *(12, 2, 4, "left out are GPU-bb: process 7 (python) holds 9 MiB"),
        ),
        (MachineShare(8, 9e4, DeviceSurvey(GPUS), dict.fromkeys(GPUS, "x")), 12, 1, 8, "0 of 3"),
    ],
)
def test_auto_follows_from_the_machine(
    machine: MachineShare, n_trials: int, jobs: int, threads: int, words: str
) -> None:
    """Cores, memory and trials on a CPU; the GPUs that no other process uses elsewhere."""
    found = _count(machine, n_trials=n_trials)
    assert (found.jobs, found.threads) == (jobs, threads)
    assert words in found.reason


def test_a_wide_trial_gets_its_devices() -> None:
    """A trial on two GPUs is not refused because only one of them is free."""
    machine = MachineShare(8, 9e4, DeviceSurvey(GPUS), {"GPU-aa": "x", "GPU-bb": "x"})
    assert _count(machine, "training.devices_per_trial=2").jobs == 2


def test_a_study_keeps_its_number() -> None:
    """Whatever the machine is today: the order of the search depends on it."""
    assert _count(stored={"jobs": 5, "threads": 3}, begun=True).stored() == {
        "jobs": 5,
        "threads": 3,
    }
    assert _count(begun=True).jobs == 1, "n_jobs=1 was the default of the versions that stored none"
    assert _count(wanted=4, stored={"jobs": 5, "threads": 3}, begun=True).jobs == 4
    assert _count(wanted=5, stored={"jobs": 5, "threads": 3}, begun=True).threads == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("workers.engine=inline",), "inline"),
        (("workers.trainer=fake",), "fake trainer"),
        (("workers=ray", "workers.address=auto"), "give the number of its devices"),
        (("model.base_model=org/absent",), "not known before its download"),
    ],
)
def test_one_worker_where_nothing_tells_how_many(overrides: tuple[str, ...], words: str) -> None:
    """The reason says so, and what to do."""
    found = _count(TWO_CORES, *overrides)
    assert found.jobs == 1
    assert words in found.reason


def test_other_processes_are_found_on_gpus_by_index_uuid_and_prefix() -> None:
    """Listed processes, and memory that processes of other containers hold."""
    gpus = "0, GPU-aa11, 4 MiB\n1, GPU-bb22, 30000 MiB\n2, GPU-cc33, 9000 MiB\n"
    processes = "GPU-bb22, 812, /usr/bin/python3, 29000 MiB\nMIG-7, 9, a.out, 5 MiB\n"
    found = parse_use(["0", "GPU-bb", "2", "MIG-7", "MIG-8"], gpus, processes)
    assert found == {
        "GPU-bb": "process 812 (python3) holds 29000 MiB",
        "2": "9000 MiB in use",
        "MIG-7": "process 9 (a.out) holds 5 MiB",
    }
    assert free_first(DeviceSurvey(("GPU-bb", "0")), found).names == ("0", "GPU-bb")


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    """Of several files; a broken one leaves the number unknown."""
    header = {"__metadata__": {}, "a": {"shape": [3, 5]}, "b": {"shape": []}}
    text = json.dumps(header).encode()
    for name in "xy":
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
    assert parameters_in(tmp_path.glob("*.safetensors")) == 32
    (tmp_path / "y.safetensors").write_bytes(b"not safetensors")
    assert parameters_in(tmp_path.glob("*.safetensors")) is None
