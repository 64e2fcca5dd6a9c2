"""The services that every part of a running study uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sweeper.core.paths import StudyFolder
from sweeper.driver.folder_claims import FolderClaims
from sweeper.reporting.study_progress import StudyProgress, StudyView
from sweeper.tracking.tracker import Tracker


@dataclass(frozen=True)
class StudyServices:
    """The study's folder, tracker, view with the board, UUID, and the provenance of this process."""

    folder: StudyFolder
    tracker: Tracker
    view: StudyView
    board: StudyProgress
    provenance: Mapping[str, str]
    study: str
    """The study's UUID."""

    @property
    def claims(self) -> FolderClaims:
        """Claims of trial folders for this study."""
        return FolderClaims(self.folder, self.study, self.tracker, self.view.event)
