"""Choose the engine that `workers.engine` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeper.settings import Workers
from sweeper.workers.inline import InlineEngine
from sweeper.workers.local import LocalEngine
from sweeper.workers.protocol import Engine


def open_engine(workers: Workers, n_jobs: int, log: Callable[[int], Path]) -> Engine:
    """Start the workers; the caller closes the engine in a `finally`."""
    if workers.engine == "inline":
        return InlineEngine(workers)
    return LocalEngine(workers, n_jobs, log)
