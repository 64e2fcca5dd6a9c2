"""The GPUs of this machine, as nvidia-smi and the variables name them, and how workers share them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper.core.errors import WorkerError
from sweeper.modeling import hardware
from sweeper.workers import devices
from sweeper.workers.devices import (
    ALLOCATOR_VARIABLES,
    DeviceSurvey,
    devices_of,
    see_devices,
    share_devices,
    survey_devices,
)

CUDA, ROCM = "2.11.0+cu130", "2.11.0+rocm7.1"
TWO = """\
GPU 0: NVIDIA H200 (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
GPU 1: NVIDIA H200 (UUID: GPU-0aa1b2c3-d33d-2b2c-524d-9e3d8d2b8a78)
"""
SPLIT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-0aa1b2c3-d33d-2b2c-524d-9e3d8d2b8a78)
"""
FAILED = "Failed to initialize NVML: Driver/library version mismatch\n"

FakeSmi = Callable[[str, int], None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSmi:
    """Put an nvidia-smi on the PATH that answers `-L` with a text and an exit code."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def install(answer: str, code: int) -> None:
        program = tmp_path / "nvidia-smi"
        script = f'#!/bin/sh\n[ "$1" = -L ] || exit 2\nprintf "{answer}"\nexit {code}\n'
        program.write_text(script, encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        (TWO, ["GPU-5d5b", "GPU-0aa1"]),
        (SPLIT, ["MIG-c6d4", "MIG-cba6", "GPU-0aa1"]),
        ("", []),
    ],
)
def test_gpus_are_named_by_uuid(listing: str, names: list[str], smi: FakeSmi) -> None:
    """A GPU is named by its UUID, and a GPU that is split into MIG instances by those of its parts."""
    smi(listing, 0)
    assert [name[:8] for name in survey_devices(CUDA).names] == names


def test_a_failing_nvidia_smi_names_no_gpu(smi: FakeSmi) -> None:
    """Words of an error are no devices. The survey repeats them as the reason for using the CPU."""
    smi(FAILED, 18)
    survey = survey_devices(CUDA)
    assert survey.names == ()
    assert "Driver/library version mismatch" in survey.problem
    assert share_devices(survey, 2, 1) == [survey.problem]


def test_a_torch_without_cuda_has_no_gpu(smi: FakeSmi) -> None:
    """A CPU build of torch leaves the machine's GPUs alone."""
    smi(TWO, 0)
    assert survey_devices("2.11.0+cpu") == DeviceSurvey()


@pytest.mark.parametrize(
    ("value", "names", "said"),
    [
        ("0,1,", ["0", "1"], ""),
        (" 3 , 5 ", ["3", "5"], ""),
        ("", [], ""),
        ("-1", [], ""),
        ("0,-1,2", ["0"], ""),
        ("GPU-5d5b,MIG-c6d4", ["GPU-5d5b", "MIG-c6d4"], ""),
        ("0,Failed,1", ["0"], "'Failed' names no GPU"),
        ("0,0", [], "named twice"),
    ],
)
def test_the_variable_is_read_as_cuda_reads_it(value: str, names: list[str], said: str) -> None:
    """The list ends at the first entry that names no GPU. Entries that are no mistake need no word."""
    survey = survey_devices(CUDA, {"CUDA_VISIBLE_DEVICES": value})
    assert list(survey.names) == names
    assert said in survey.problem
    assert bool(survey.problem) == bool(said)


def test_amd_reads_its_own_variable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HIP_VISIBLE_DEVICES counts on AMD only, ROCR's hides GPUs below it, and Linux counts the GPUs."""
    both = {"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert survey_devices(ROCM, both).names == ("2",)
    assert survey_devices(CUDA, both).names == ("0", "1")
    assert survey_devices(ROCM, {"ROCR_VISIBLE_DEVICES": "4,6"}).names == ("0", "1")
    for node, cores in enumerate((0, 304, 304)):
        (tmp_path / str(node)).mkdir()
        text = f"cpu_cores_count 8\nsimd_count {cores}\nmem_banks_count 1\n"
        (tmp_path / str(node) / "properties").write_text(text, encoding="ascii")
    monkeypatch.setattr(devices, "KFD_NODES", tmp_path)
    assert survey_devices(ROCM, {}).names == ("0", "1")


def test_groups_of_wide_workers_never_overlap() -> None:
    """A worker of several GPUs takes a whole group: [0, 1, 2] and [3, 0, 1] would share two GPUs."""
    four = DeviceSurvey(("0", "1", "2", "3"))
    assert devices_of(0, 3, four) == devices_of(1, 3, four) == ["0", "1", "2"]
    with pytest.raises(WorkerError, match=r"n_jobs=6 is 2 workers .* Set hydra.sweeper.n_jobs=3"):
        share_devices(four, 2, 3)
    with pytest.raises(WorkerError, match="shows 4 GPUs"):
        share_devices(four, 1, 5)
    assert share_devices(four, 2, 2) == []


def test_shared_and_idle_gpus_are_said() -> None:
    """More workers than GPUs share them, and fewer leave some idle. Both are said with a way out."""
    two = DeviceSurvey(("0", "1"))
    (shared,) = share_devices(two, 5, 1)
    assert "5 workers share 2 GPUs" in shared
    assert "hydra.sweeper.n_jobs=2" in shared
    (idle,) = share_devices(DeviceSurvey(tuple("01234567")), 1, 2)
    assert "6 of 8 GPUs stay idle" in idle
    assert "hydra.sweeper.n_jobs=8" in idle
    assert share_devices(two, 2, 1) == []
    assert share_devices(DeviceSurvey(), 4, 1) == []


def test_mig_instances_are_not_joined() -> None:
    """A process can use one MIG instance, so a trial on two of them is refused."""
    with pytest.raises(WorkerError, match="MIG instance"):
        devices_of(0, 2, DeviceSurvey(("MIG-c6d4", "MIG-cba6")))


def test_a_rank_sees_its_own_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank sees all GPUs of its trial, its own first, and nvidia-smi's indices are CUDA's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    see_devices("GPU-b", ["GPU-a", "GPU-c"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a,GPU-c"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    see_devices(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a,GPU-c"


@pytest.mark.parametrize(
    ("configured", "wsl", "expected"),
    [
        ({}, False, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({}, True, {}),
        *(
            ({name: "backend:cudaMallocAsync"}, False, {name: "backend:cudaMallocAsync"})
            for name in ALLOCATOR_VARIABLES
        ),
    ],
)
def test_a_gpu_worker_reserves_memory_in_segments(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    configured: dict[str, str],
    wsl: bool,
    expected: dict[str, str],
) -> None:
    """torch's allocator extends its segments, except under WSL2 or a configuration of the user."""
    monkeypatch.setattr(devices, "WSL_SMI", tmp_path if wsl else tmp_path / "none")
    monkeypatch.setattr(os, "environ", dict(configured))
    see_devices(None)
    assert os.environ == configured
    see_devices("GPU-b")
    assert {
        name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ
    } == expected


def test_an_assigned_gpu_that_torch_does_not_find_is_an_error() -> None:
    """A worker that was given a GPU never trains on the CPU without a word."""
    with pytest.raises(WorkerError, match="cannot use GPU GPU-a"):
        hardware.prepare_device("GPU-a")
    hardware.prepare_device(None)


def test_allocations_are_capped_where_the_driver_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under WSL2 torch may allocate what the GPU has free. Beyond that the driver would use RAM."""
    assert hardware.spills("5.15.153.1-microsoft-standard-WSL2")
    assert not hardware.spills("6.8.0-45-generic")
    capped: list[float] = []
    cuda = hardware.torch.cuda
    monkeypatch.setattr(hardware, "spills", lambda: True)
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "mem_get_info", lambda on: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(
        cuda, "set_per_process_memory_fraction", lambda part, on: capped.append(part)
    )
    hardware.prepare_device("0")
    assert capped == [0.75]
