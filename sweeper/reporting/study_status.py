"""Where a study stands: what its driver writes down every few seconds for whoever asks.

One small file, so that a look at a study needs neither its database nor an answer of its driver.
Imported by the verbs: knows no Optuna (sweeper.driver.arm_status fills in what a storage says).
"""

from __future__ import annotations

import os
import socket
from typing import Literal

from filelock import FileLock, Timeout

from sweeper.config.settings import Objective
from sweeper.config.space import Scalar
from sweeper.core.paths import StudyFolder
from sweeper.core.value import FrozenValue
from sweeper.reporting.study_progress import TrialProgress

LOOK_SECONDS = 0.2
"""How long a look at the lock waits for another look."""

StudyState = Literal[
    "starting", "running", "paused", "stopping", "finished", "stopped", "failed", "killed"
]
ENDED: tuple[StudyState, ...] = ("finished", "stopped", "failed", "killed")


class TrialStatus(FrozenValue):
    """One trial at a glance."""

    trial: str
    """lora/0007."""
    state: str
    point: dict[str, Scalar]
    step: int = 0
    total_steps: int = 0
    value: float | None = None
    """Of the objective: the best so far where pruning goes by it, else of what pruning goes by."""


class ArmStatus(FrozenValue):
    """One arm at a glance."""

    name: str
    wanted: int
    done: int
    """Trials that use up one of those wanted."""
    trials: dict[str, int]
    """How many ended for which cause."""
    best: TrialStatus | None
    queue: tuple[dict[str, Scalar], ...]
    """What is tried before the sampler chooses, in this order."""


class StudyStatus(FrozenValue):
    """A study at a glance."""

    study_name: str
    state: StudyState
    command: str
    """What starts it again, after `python -m sweeper`."""
    since: str
    """Local time of the driver's start."""
    process: int
    host: str
    objective: Objective
    left: str
    """Of the budget, in words; empty without a limit."""
    arms: tuple[ArmStatus, ...]
    running: tuple[TrialStatus, ...]


def process_of_driver() -> tuple[int, str]:
    """Of this process: its number and its machine."""
    return os.getpid(), socket.gethostname()


def trial_standing(view: TrialProgress) -> TrialStatus:
    """A trial of the board."""
    return TrialStatus(
        trial=view.key,
        state=view.state,
        point=dict(view.point),
        step=view.step,
        total_steps=view.total_steps,
        value=view.value if view.best is None else view.best,
    )


def is_driven(folder: StudyFolder) -> bool:
    """Whether a driver runs this study now: it holds the lock, on whichever machine."""
    if not folder.lock.exists():
        return False
    try:
        with FileLock(folder.lock, timeout=LOOK_SECONDS):
            return False
    except Timeout:
        return True
