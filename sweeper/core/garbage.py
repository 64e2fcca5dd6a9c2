"""Pause Python's garbage collection while much is imported, and exempt what was imported from it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection for the duration of the block."""
    # torch and transformers create a million objects that stay. A third of their import is the
    # collector's walks over them
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def exempt_from_collection() -> None:
    """Exempt all objects of this process from garbage collection, for ever.

    Only for a worker's own process, once, after its imports. Every trial collects garbage, and a walk
    over the imports' objects takes longer than a step of a small model.
    """
    gc.collect()  # what is garbage now would never be freed
    gc.freeze()
