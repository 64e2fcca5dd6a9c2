"""What tests of trials on several devices share."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import read_spool
from tests.training.recorder import Recorder

Train = Callable[..., tuple[Outcome, Recorder, TrialFolder]]


def spooled(folder: TrialFolder, name: str) -> list[float]:
    return [row[name] for row in read_spool(folder.metrics) if name in row]


class KillsFollowers(Recorder):
    """After the second evaluation there is nobody left to follow."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        super().evaluated(step, total_steps, value)
        if len(self.losses) < 2:
            return
        for child in psutil.Process().children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
