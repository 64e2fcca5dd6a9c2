"""Looks after a study between two turns of the loop: commands, the view, and the status file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sweeper.driver.command_handler import CommandHandler
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.jobs import JobSource
from sweeper.driver.status_writer import StatusWriter
from sweeper.reporting.study_progress import StudyProgress, StudyView


@dataclass
class StudySupervisor:
    """The supervisor of a whole study, whatever kind of job runs."""

    commands: CommandHandler
    status: StatusWriter
    board: StudyProgress
    view: StudyView

    def on_turn(self, dispatcher: Dispatcher, source: JobSource[Any]) -> None:
        """See Supervisor."""
        self.board.left = source.budget_left
        if self.board.arm:  # none before the first arm is opened
            self.view.update(self.board)
        self.status.enter(dispatcher.mode)
        self.commands.obey(dispatcher)
        self.status.write_if_due()
