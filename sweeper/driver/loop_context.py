"""What a session shares with the loops that it runs one after the other: each arm's, the finalists'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sweeper.core.paths import StudyFolder
from sweeper.core.signals import StopSignal
from sweeper.reporting.study_progress import StudyProgress, StudyView
from sweeper.tracking.tracker import Tracker
from sweeper.workers.protocol import Engine


@dataclass(frozen=True)
class LoopContext:
    """The study's folder, its workers, where it is recorded and shown, and who may stop it."""

    folder: StudyFolder
    engine: Engine
    tracker: Tracker
    view: StudyView
    board: StudyProgress
    provenance: Mapping[str, str]
    slots: dict[int, int]
    """Free slots by worker; carried on from loop to loop."""
    interrupt: StopSignal
