"""The status of a study, which its driver writes every few seconds.

One small file, so that a look at a study needs neither its database nor an answer of its driver.
Imports no Optuna, because the verbs read it. sweeper.driver.arm_status adds what the storage says.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from sweeper.config.settings import Objective
from sweeper.config.space import Scalar
from sweeper.core.paths import StudyFolder
from sweeper.core.value import FrozenValue
from sweeper.reporting.study_progress import TrialProgress

LOOK_SECONDS = 0.2
"""Seconds that a look at the lock waits for a command that holds it."""
FRESH_SECONDS = 15.0
"""Age of a status that a driver, which writes one every two seconds, has just written."""

StudyPhase = Literal[
    "starting", "running", "paused", "stopping", "finished", "stopped", "failed", "killed"
]
ENDED: tuple[StudyPhase, ...] = ("finished", "stopped", "failed", "killed")


class TrialStatus(FrozenValue):
    """The status of one trial."""

    trial: str
    """lora/0007."""
    state: str
    point: dict[str, Scalar]
    step: int = 0
    total_steps: int = 0
    value: float | None = None
    """The objective's best value so far, or the last value of the metric that pruning goes by."""


class ArmStatus(FrozenValue):
    """The status of one arm."""

    name: str
    wanted: int
    done: int
    """The number of trials that use budget (one of n_trials)."""
    trials: dict[str, int]
    """The number of ended trials by cause."""
    best: TrialStatus | None
    queue: tuple[dict[str, Scalar], ...]
    """The points that are tried before the sampler chooses, in this order."""


class StudyStatus(FrozenValue):
    """The status of a study."""

    study_name: str
    state: StudyPhase
    command: str
    """The arguments of `python -m sweeper` that start the study again."""
    since: str
    """Local time of the driver's start."""
    process: int
    host: str
    objective: Objective
    left: str
    """Remaining budget as text, or "" when there is no limit."""
    arms: tuple[ArmStatus, ...] = Field(min_length=1)
    running: tuple[TrialStatus, ...]


def process_of_driver() -> tuple[int, str]:
    """Return the number and the machine of this process."""
    return os.getpid(), socket.gethostname()


def trial_standing(view: TrialProgress) -> TrialStatus:
    """Return the status of a trial from its progress."""
    return TrialStatus(
        trial=view.key,
        state=view.state,
        point=dict(view.point),
        step=view.step,
        total_steps=view.total_steps,
        value=view.value if view.best is None else view.best,
    )


def is_driven(folder: StudyFolder) -> bool:
    """Return True if a driver on any machine runs this study now, because it holds the lock.

    A look needs no right to write. Without the right to read the lock, a status that was written
    just now tells of a driver.
    """
    try:
        return is_locked(folder.lock)
    except OSError:
        return _is_fresh(folder.standing)


def is_locked(path: Path) -> bool:
    """Return True if a process holds a lock file, without a right to write it.

    Raises:
        OSError: the file cannot be opened for reading.
    """
    try:
        # without O_NONBLOCK a pipe in the lock's place would wait for its writer
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return not _is_free(lock)
    finally:
        os.close(lock)


def _is_free(lock: int) -> bool:
    """Return True if nobody but other lookers holds a lock."""
    end = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            # shared, or two lookers would take each other for a driver
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # `sync` and `clean` hold the lock for a moment
            if time.monotonic() > end:
                return False
        else:
            return True
        time.sleep(LOOK_SECONDS / 10)


def _is_fresh(path: Path) -> bool:
    try:
        # the clock of another machine may be ahead
        return abs(time.time() - path.stat().st_mtime) < FRESH_SECONDS
    except OSError:
        return False
