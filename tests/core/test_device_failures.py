"""Texts of CUDA, its libraries and C++, as they were copied from their sources and reports."""

from __future__ import annotations

import pytest

from sweeper.core.device_failures import (
    BROKEN_CONTEXT,
    breaks_context,
    cause_of_death,
    last_words,
    means_out_of_memory,
)
from sweeper.core.errors import WorkerError


class AcceleratorError(RuntimeError):
    """A stand-in for torch's class of this name, which CPU builds cannot raise."""


MEMORY = [
    "CUDA out of memory. Tried to allocate 20.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED\nException raised from createCuDNNHandle",
    "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    "Last error:\nFailed to CUDA calloc async 608 bytes",
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
]
CONTEXT = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
    "NCCL error in: ProcessGroupNCCL.cpp:77, ncclUnhandledCudaError: Call to CUDA function failed",
]


@pytest.mark.parametrize("text", MEMORY)
def test_texts_of_memory(text: str) -> None:
    """Memory that ran out breaks no context: the trial can be tried in a smaller form."""
    assert means_out_of_memory(text)
    assert not breaks_context(RuntimeError(text))


@pytest.mark.parametrize("text", CONTEXT)
def test_texts_of_a_broken_context(text: str) -> None:
    """These leave a process whose every further call to the GPU fails."""
    assert not means_out_of_memory(text)
    assert breaks_context(RuntimeError(text))


def test_the_class_of_an_error_counts_as_its_text() -> None:
    """torch raises AcceleratorError for what CUDA reports, also under a text of the future."""
    assert breaks_context(AcceleratorError("a new kind of failure"))
    assert not breaks_context(AcceleratorError("CUDA error: out of memory"))
    assert not breaks_context(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not breaks_context(WorkerError("rank 1 did not end its part of the trial"))


@pytest.mark.parametrize(
    ("tail", "cause", "said"),
    [
        ("", "crash", ""),
        ("loading\nSegmentation fault", "crash", "Segmentation fault"),
        (
            "step 3\nError out of memory at line 541 in file /src/csrc/ops.cu",
            "oom",
            "Error out of memory at line 541 in file /src/csrc/ops.cu",
        ),
        (
            "Error invalid device ordinal at line 389 in file /src/csrc/pythonInterface.cpp\n",
            "device",
            "Error invalid device ordinal at line 389 in file /src/csrc/pythonInterface.cpp",
        ),
        (
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc",
            "oom",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        (
            "terminate called after throwing an instance of 'c10::DistBackendError'\n"
            "  what():  [Rank 1] watchdog thread terminated with exception: CUDA error: an illegal",
            "device",
            "terminate called after throwing an instance of 'c10::DistBackendError'",
        ),
        ("terminate called after throwing an instance of 'std::logic_error'", "crash", None),
        # handled by the trial, which continued with a smaller micro-batch
        ("UserWarning: CUDA out of memory, retried\nSegmentation fault", "crash", None),
        (
            f"Traceback\nsweeper.core.errors.WorkerError: {BROKEN_CONTEXT}: CUDA error: an illegal",
            "device",
            f"sweeper.core.errors.WorkerError: {BROKEN_CONTEXT}: CUDA error: an illegal",
        ),
    ],
)
def test_the_last_words_of_a_dead_worker(tail: str, cause: str, said: str | None) -> None:
    """A worker's log tells why its process ended, where a library or C++ has ended it."""
    assert cause_of_death(tail) == cause
    if said is not None:
        assert last_words(tail) == said
