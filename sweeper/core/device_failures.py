"""The texts by which CUDA, its libraries and C++ say that memory ran out or that a GPU's context broke.

A broken context is one in which every further call fails, until its process ends. bitsandbytes and C++
end the process themselves, so their last words in its log are all that is left.
"""

from __future__ import annotations

import re
from typing import Literal

from sweeper.core.errors import WorkerError, first_line

DeathCause = Literal["crash", "oom", "device"]
"""Cause of a process's end: a crash, memory that ran out, or a broken context of its GPU."""

MEMORY_TEXTS = (
    "out of memory",
    # torch's allocator of CPU memory
    "can't allocate memory",
    # the operating system (ENOMEM)
    "cannot allocate memory",
    # C++'s operator new
    "std::bad_alloc",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "failed to cuda calloc",  # NCCL's buffers
    "failed to cuda malloc",
    "failed to cuda host alloc",
)
LIBRARY_CREATION = re.compile(r"(cublas|cudnn|cusolver)_status_not_initialized.*?create", re.DOTALL)
"""The failed creation of a library's handle, which is the first to miss memory on a full GPU."""
CONTEXT_TEXTS = ("cuda error", "cuda failure", "hip error", "ncclunhandledcudaerror")
BROKEN_CONTEXT = "the context of this worker's GPU is broken"
LAST_WORDS = re.compile(
    rf"^(Error .+ at line \d+ in file \S+|terminate called after throwing|.*{BROKEN_CONTEXT})", re.M
)
"""Begin of the last words of bitsandbytes, of the C++ runtime, and of a worker's own error."""


def means_out_of_memory(text: str) -> bool:
    """Return True if an error's text means that memory ran out."""
    text = text.lower()
    return any(words in text for words in MEMORY_TEXTS) or bool(LIBRARY_CREATION.search(text))


def breaks_context(error: BaseException) -> bool:
    """Return True if after this error every further use of the GPU by this process would fail."""
    text = str(error)
    if means_out_of_memory(text):
        return False
    # By name, because torch is not imported here
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "AcceleratorError" in kinds or any(words in text.lower() for words in CONTEXT_TEXTS)


def require_whole_context(error: BaseException) -> None:
    """End a worker whose GPU cannot be used any more by its process.

    Raises:
        WorkerError: the error has broken the context.
    """
    if breaks_context(error):
        raise WorkerError(f"{BROKEN_CONTEXT}: {first_line(error)}") from error


def cause_of_death(log_tail: str) -> DeathCause:
    """Return the cause of a process's end, from the last lines of its log."""
    found = LAST_WORDS.search(log_tail)
    if found is None:
        return "crash"
    words = log_tail[found.start() :]
    if means_out_of_memory(words):
        return "oom"
    native = found.group().startswith("terminate")
    context = not native or any(text in words.lower() for text in CONTEXT_TEXTS)
    return "device" if context else "crash"


def last_words(log_tail: str) -> str:
    """Return the line of a dead process's log that tells most: its last words, or its last line."""
    found = LAST_WORDS.search(log_tail)
    lines = (log_tail[found.start() :] if found else log_tail).strip().splitlines()
    if not lines:
        return ""
    return lines[0] if found else lines[-1]
