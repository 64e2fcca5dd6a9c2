"""Writes standing.json: where the study stands, for the verbs that look at it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from sweeper.core.paths import StudyFolder, write_atomic, write_json
from sweeper.core.stored_files import read_words
from sweeper.driver.arm_status import arm_standing
from sweeper.driver.command_log import TIME_FORMAT
from sweeper.driver.study_state import StudyState
from sweeper.reporting.study_status import (
    StudyPhase,
    StudyStatus,
    process_of_driver,
    trial_standing,
)
from sweeper.tracking.tracker import RunStatus

STATUS_SECONDS = 2.0
"""Seconds between two writes. A judgement: `study show` stays current, and a write takes
milliseconds."""
END_STATES: dict[RunStatus, StudyPhase] = {
    "FINISHED": "finished",
    "KILLED": "stopped",
    "FAILED": "failed",
}


class StatusWriter:
    """Writes the file when the study's phase changes, and every STATUS_SECONDS in between."""

    def __init__(
        self, state: StudyState, folder: StudyFolder, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state = state
        self._folder = folder
        self._clock = clock
        self._since = time.strftime(TIME_FORMAT)
        self._written_at = -STATUS_SECONDS
        self._phase: StudyPhase = "starting"
        self._earlier = read_words(folder.standing) or None

    def enter(self, phase: StudyPhase) -> None:
        """Change the study's phase, and write the file if it is another one."""
        if phase != self._phase:
            self._phase = phase
            # shown in the headline of the live table
            self._state.board.note = phase if phase in ("paused", "stopping") else ""
            self.write()

    def end(self, status: RunStatus) -> None:
        """Write the last phase of this run.

        Raises:
            OSError: the file cannot be written, and still tells of a running study.
        """
        self._phase = END_STATES[status]
        self._write()

    def restore(self) -> None:
        """Write the status that was there before this run, which has changed nothing."""
        if self._earlier is not None:
            with suppress(OSError):
                write_atomic(self._folder.standing, self._earlier)

    def write_if_due(self) -> None:
        """Write the file if STATUS_SECONDS have passed."""
        if self._clock() - self._written_at >= STATUS_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, unless the disk is full: the study must not end for its status."""
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        self._written_at = self._clock()
        state, (process, host) = self._state, process_of_driver()
        standing = StudyStatus(
            study_name=state.plan.study.study_name,
            state=self._phase,
            command=state.plan.command,
            since=self._since,
            process=process,
            host=host,
            objective=state.plan.objective,
            left=state.board.left,
            arms=tuple(arm_standing(arm, state.studies.get(arm.name)) for arm in state.plan.arms),
            running=tuple(
                trial_standing(trial) for trial in state.board.trials.values() if not trial.ended
            ),
        )
        write_json(self._folder.standing, standing.model_dump(mode="json"))
