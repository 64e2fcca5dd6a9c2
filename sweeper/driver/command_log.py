"""steering.json: the commands that a study has obeyed, and the totals that they have raised."""

from __future__ import annotations

import time

from pydantic import Field

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder, write_json
from sweeper.core.stored_files import damage
from sweeper.core.value import FrozenValue
from sweeper.driver.command_files import CommandAnswer, CommandFile, StudyCommand

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class AnsweredCommand(FrozenValue):
    """A command and its answer."""

    at: str
    command: StudyCommand
    answer: CommandAnswer


class CommandRecord(FrozenValue):
    """The content of steering.json."""

    # totals, not differences: n_trials may also be raised on
    # the command line, and would count twice
    totals: dict[str, int] = Field(default_factory=dict)
    """The n_trials that commands have raised, by arm."""
    commands: dict[str, AnsweredCommand] = Field(default_factory=dict)
    """All answered commands, by their ids."""


class CommandLog:
    """Stores effects and answers together, so that no command has its effect twice."""

    def __init__(self, folder: StudyFolder) -> None:
        """
        Raises:
            StudyError: the file is there, but cannot be read.
        """
        self._folder = folder
        self._record = _read(folder)

    @property
    def totals(self) -> dict[str, int]:
        """The raised totals, by arm. A change is stored with the next answer."""
        return self._record.totals

    def answer_to(self, identity: str) -> CommandAnswer | None:
        """Return the answer that a command was given, or None if it was not answered yet."""
        answered = self._record.commands.get(identity)
        return None if answered is None else answered.answer

    def note(self, letter: CommandFile, answer: CommandAnswer) -> None:
        """Take down a command's answer. `store` writes it with the raised totals."""
        answered = AnsweredCommand(
            at=time.strftime(TIME_FORMAT), command=letter.command, answer=answer
        )
        self._record.commands[letter.id] = answered

    def store(self) -> None:
        """Write the answers and the raised totals.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(self._folder.steering, self._record.model_dump(mode="json"))


def _read(folder: StudyFolder) -> CommandRecord:
    if not folder.steering.exists():
        return CommandRecord()
    try:
        return CommandRecord.model_validate_json(folder.steering.read_bytes())
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{folder.steering} cannot be read ({damage(error)}). Move it away to continue: the trials "
            "that `study extend` has added are then forgotten, and can be added again"
        ) from None
