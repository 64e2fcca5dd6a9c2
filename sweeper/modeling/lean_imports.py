"""Import transformers, PEFT and bitsandbytes without the libraries that no trial calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

UNUSED = ("datasets", "scipy")
"""Libraries that transformers imports where they are installed.

Its Trainer would recognise a Dataset of the first one. Its losses for object detection call the second.
"""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Leave out of the block's imports what takes seconds and serves no language model.

    transformers' modules that the block imports find no library of UNUSED. Later imports and all other
    modules find them. A function that these imports have torch compile is compiled at its first call.
    """
    import torch
    import transformers.utils

    with ExitStack() as stack:
        # bitsandbytes has four functions compiled that CPUs with its own kernels never call. torch
        # imports its whole compiler already for the request
        stack.enter_context(_replaced(torch, "compile", compile_at_first_call))
        for library in UNUSED:
            stack.enter_context(_replaced(transformers.utils, f"is_{library}_available", _absent))
        yield


def compile_at_first_call(
    function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Return a function that behaves as torch.compile's, and has it compile when it is first called."""
    if function is None:  # used as a decorator with options
        return functools.partial(compile_at_first_call, **options)
    import torch

    compiled = functools.cache(lambda: torch.compile(function, **options))

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


def _absent() -> bool:
    return False


@contextmanager
def _replaced(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)
