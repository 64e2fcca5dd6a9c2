"""Choose the engine that `workers.engine` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeper.config.settings import WorkerSettings
from sweeper.core.errors import WorkerError
from sweeper.workers.inline_engine import InlineEngine
from sweeper.workers.local_engine import LocalEngine
from sweeper.workers.protocol import Engine
from sweeper.workers.time_limits import LimitedEngine


def open_engine(
    workers: WorkerSettings,
    n_jobs: int,
    log: Callable[[int], Path],
    devices: int = 1,
    say: Callable[[str], None] = print,
    threads: int | None = None,
) -> Engine:
    """Start the workers. The caller closes the engine, whatever happens.

    Args:
        workers: the engine, the trainer, and the time limits.
        n_jobs: number of workers (the inline engine has one).
        log: returns the file that a worker prints into.
        devices: number of devices of each worker (one with the inline engine).
        say: takes a sentence about GPUs that are shared, idle or unusable.
        threads: CPU threads of each process of a local worker, or None for an equal share.

    Raises:
        WorkerError: the engine cannot be started here, or workers would have GPUs in common.
    """
    count = 1 if workers.engine == "inline" else n_jobs
    return LimitedEngine(_hosts(workers, n_jobs, devices, log, say, threads), workers, count=count)


def _hosts(
    workers: WorkerSettings,
    n_jobs: int,
    devices: int,
    log: Callable[[int], Path],
    say: Callable[[str], None],
    threads: int | None,
) -> Engine:
    if workers.engine == "inline":
        return InlineEngine(workers)
    if workers.engine == "local":
        return LocalEngine(workers, n_jobs, devices, log, say, threads)
    try:
        from sweeper.workers.ray_engine import RayEngine
    except ModuleNotFoundError as error:
        # a module that Ray itself lacks is a fault of its installation, which the traceback shows
        if error.name != "ray":
            raise
        raise WorkerError(
            "workers=ray needs Ray, which is optional: pip install 'sweeper[ray]' here and on every node"
        ) from None
    return RayEngine(workers, n_jobs, devices, log)
