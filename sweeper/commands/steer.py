"""Look at studies and send them commands, from another terminal than their drivers'.

Reads the files that drivers write, and puts commands into their inboxes. Opens no database, and
writes nothing else of a study.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sweeper.config.settings import StudyName
from sweeper.core.errors import CommandRefused
from sweeper.core.paths import StudyFolder
from sweeper.driver.command_files import (
    MAX_BYTES,
    TO_A_DRIVER,
    CommandAnswer,
    StudyCommand,
    send,
    take_answer,
    withdraw,
)
from sweeper.reporting.study_status import ENDED, StudyStatus, is_driven

APPLIED, REFUSED, KEPT = 0, 2, 3
"""Exit codes of the verbs that send a command."""
POLL_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class CommandReply:
    """Result of a command."""

    exit_code: int
    text: str

    def document(self, study_name: str, command: StudyCommand) -> dict[str, object]:
        """Return the result as a JSON document."""
        result = {APPLIED: "applied", REFUSED: "refused", KEPT: "kept"}[self.exit_code]
        sent = command.model_dump(mode="json")
        return {"study": study_name, "command": sent, "result": result, "text": self.text}


def study_folder(name: str, output_dir: Path) -> StudyFolder:
    """Return the folder of a study that a driver has opened.

    Raises:
        CommandRefused: the text is no study name, or there is no such study. Lists those there are.
    """
    folder = StudyFolder(output_dir / name)
    if not _is_name(name) or not folder.standing.exists():
        names = ", ".join(found.path.name for found in _studies(output_dir))
        known = f"studies there: {names}" if names else "there are no studies yet"
        raise CommandRefused(f"no study {name!r} under {output_dir}/; {known}")
    return folder


def standing(folder: StudyFolder) -> StudyStatus:
    """Return a study's status. A study whose driver vanished counts as killed.

    Raises:
        CommandRefused: the status file cannot be read.
    """
    try:
        found = StudyStatus.model_validate_json(folder.standing.read_bytes())
    except ValidationError:
        raise CommandRefused(
            f"{folder.standing} was written by another version of sweeper. Run the study's command "
            "again: it is written anew"
        ) from None
    if found.state not in ENDED and not is_driven(folder):
        return found.model_copy(update={"state": "killed", "running": ()})
    return found


def standings(output_dir: Path) -> list[StudyStatus]:
    """Return the status of all studies under an output_dir by name, unreadable ones left out."""
    found = []
    for folder in _studies(output_dir):
        try:
            found.append(standing(folder))
        except CommandRefused:
            continue
    return found


def silent(output_dir: Path) -> list[str]:
    """Return the names of studies that have results but no status file."""
    named = {found.study_name for found in standings(output_dir)}
    return sorted({path.parent.name for path in output_dir.glob("*/results.json")} - named)


def values_of(texts: Sequence[str]) -> dict[str, str]:
    """Parse KEY=VALUE arguments.

    Raises:
        CommandRefused: an argument has another form, or a key comes twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key or not value:
            raise CommandRefused(f"{text}: write KEY=VALUE, as in training.learning_rate=3e-3")
        if key in values:
            raise CommandRefused(f"{key}: given twice")
        values[key] = value
    if sum(map(len, texts)) > MAX_BYTES // 2:
        raise CommandRefused("these values are longer than anybody writes")
    return values


def steer(folder: StudyFolder, command: StudyCommand, timeout_s: float) -> CommandReply:
    """Send a command and wait for the driver's answer, for a limited time."""
    driven = is_driven(folder)
    if not driven and isinstance(command, TO_A_DRIVER):
        return CommandReply(REFUSED, f"it is not running: there is nothing to {command.verb}")
    identity = send(folder, command)
    if not driven:
        return CommandReply(
            KEPT, f"no driver runs. Kept until it is started again:{_start(folder)}"
        )
    answer = _wait(folder, identity, timeout_s)
    if answer is not None:
        return CommandReply(APPLIED if answer.ok else REFUSED, answer.text)
    if is_driven(folder):
        return CommandReply(
            KEPT,
            f"no answer within {timeout_s:g} s (a driver that loads a model or waits for its database "
            "answers later). The command is kept, and obeyed as soon as it is read",
        )
    if isinstance(command, TO_A_DRIVER):
        withdraw(folder, identity)
        return CommandReply(REFUSED, "its driver ended before it read the command")
    return CommandReply(
        KEPT, f"its driver has ended. Kept until it is started again:{_start(folder)}"
    )


def _is_name(text: str) -> bool:
    """Return True if a text can be a study's name. A path cannot."""
    try:
        TypeAdapter(StudyName).validate_python(text)
    except ValidationError:
        return False
    return True


def _wait(folder: StudyFolder, identity: str, timeout_s: float) -> CommandAnswer | None:
    """Return the answer, or None after a timeout or when the driver ended."""
    end = time.monotonic() + timeout_s
    look = time.monotonic() + LOOK_AGAIN_SECONDS
    while time.monotonic() < end:
        if answer := take_answer(folder, identity):
            return answer
        if time.monotonic() > look:
            if not is_driven(folder):
                break
            look = time.monotonic() + LOOK_AGAIN_SECONDS
        time.sleep(POLL_SECONDS)
    return take_answer(folder, identity)  # it may have answered just before it ended


def _start(folder: StudyFolder) -> str:
    return f"\n    python -m sweeper {standing(folder).command}"


def _studies(output_dir: Path) -> list[StudyFolder]:
    found = (StudyFolder(path.parent) for path in output_dir.glob("*/standing.json"))
    return sorted(found, key=lambda folder: folder.path.name)
