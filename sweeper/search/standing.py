"""Where a study stands: what its driver writes down every few seconds for whoever asks.

One small file, so that a look at a study needs neither its database nor an answer of its driver.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from sweeper.folders import StudyFolder
from sweeper.outcome import Value
from sweeper.search.board import TrialView
from sweeper.search.plan import ArmPlan
from sweeper.search.states import STATES, counts
from sweeper.search.study import draw_of, point_of
from sweeper.settings import Objective
from sweeper.space import Scalar

LOOK_SECONDS = 0.2
"""How long a look at the lock waits for another look."""

State = Literal[
    "starting", "running", "paused", "stopping", "finished", "stopped", "failed", "killed"
]
ENDED: tuple[State, ...] = ("finished", "stopped", "failed", "killed")


class TrialStanding(Value):
    """One trial at a glance."""

    trial: str
    """lora/0007."""
    state: str
    point: dict[str, Scalar]
    step: int = 0
    total_steps: int = 0
    value: float | None = None
    """Of the objective: the best so far where pruning goes by it, else of what pruning goes by."""


class ArmStanding(Value):
    """One arm at a glance."""

    name: str
    wanted: int
    done: int
    """Trials that use up one of those wanted."""
    trials: dict[str, int]
    """How many ended for which cause."""
    best: TrialStanding | None
    queue: tuple[dict[str, Scalar], ...]
    """What is tried before the sampler chooses, in this order as far as is known."""


class Standing(Value):
    """A study at a glance."""

    study_name: str
    state: State
    command: str
    """What starts it again, after `python -m sweeper`."""
    since: str
    """Local time of the driver's start."""
    process: int
    host: str
    objective: Objective
    left: str
    """Of the budget, in words; empty without a limit."""
    arms: tuple[ArmStanding, ...]
    running: tuple[TrialStanding, ...]


def process_of_driver() -> tuple[int, str]:
    """Of this process: its number and its machine."""
    return os.getpid(), socket.gethostname()


def arm_standing(arm: ArmPlan, study: optuna.Study | None) -> ArmStanding:
    """What an arm's storage says; an arm whose study was never opened has nothing yet."""
    trials = [] if study is None else study.get_trials(deepcopy=False)
    causes = Counter(
        str(trial.user_attrs["cause"])
        for trial in trials
        if trial.state.is_finished() and "cause" in trial.user_attrs
    )
    return ArmStanding(
        name=arm.name,
        wanted=arm.n_trials,
        done=sum(map(counts, trials)),
        trials=dict(causes),
        best=_best(arm, trials),
        queue=tuple(draw_of(t) for t in trials if t.state is TrialState.WAITING),
    )


def trial_standing(view: TrialView) -> TrialStanding:
    """A trial of the board."""
    return TrialStanding(
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


def _best(arm: ArmPlan, trials: Sequence[FrozenTrial]) -> TrialStanding | None:
    complete = [trial for trial in trials if _may_be_best(trial)]
    order = arm.settings.objective.order
    best = min(complete, key=lambda trial: order(trial.values[0]), default=None)
    if best is None:
        return None
    return TrialStanding(
        trial=f"{arm.name}/{best.number:04d}",
        state=best.user_attrs["cause"],
        point=point_of(best),
        value=best.values[0],
    )


def _may_be_best(trial: FrozenTrial) -> bool:
    cause = trial.user_attrs.get("cause")
    return trial.state is TrialState.COMPLETE and cause in STATES and not STATES[cause].infeasible
