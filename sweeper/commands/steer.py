"""The verbs' side of a running study: reads its status and sends it commands.

Reads the files that drivers write, and puts commands into their inboxes. Opens no database, and writes
nothing else of a study.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sweeper.config.settings import is_study_name
from sweeper.core.errors import CommandRefused, sentence
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

# 2 is the exit code of CommandRefused as well, and 1 that of any other error
APPLIED, REFUSED, KEPT = 0, 2, 3
"""Exit codes of the verbs that send a command."""
POLL_SECONDS = 0.1
"""Seconds between two looks for an answer. A judgement: a person notices no such delay."""
LOOK_AGAIN_SECONDS = 1.0
"""Seconds between two looks for a driver, each of which takes its lock. A judgement."""


@dataclass(frozen=True)
class CommandReply:
    """The result of a command."""

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
        CommandRefused: there is no study of this name. The message lists those that there are.
    """
    folder = StudyFolder(output_dir / name)
    if not is_study_name(name) or not folder.standing.exists():
        names = ", ".join(found.path.name for found in _studies(output_dir))
        known = f"studies there: {names}" if names else "there are no studies yet"
        raise CommandRefused(f"no study {name!r} under {output_dir}/; {known}")
    return folder


def standing(folder: StudyFolder) -> StudyStatus:
    """Return the status of a study: "killed" if its driver is gone without a final status.

    Raises:
        CommandRefused: the status file cannot be read.
    """
    try:
        found = StudyStatus.model_validate_json(folder.standing.read_bytes())
    except OSError as error:
        raise CommandRefused(sentence(error)) from None
    except ValidationError:
        raise CommandRefused(
            f"{folder.standing} is damaged, or was written by another version of sweeper. Run the "
            "study's command again to write a new one"
        ) from None
    if found.state not in ENDED and not is_driven(folder):
        return found.model_copy(update={"state": "killed", "running": ()})
    return found


def standings(output_dir: Path) -> list[StudyStatus]:
    """Return the status of all studies under an output_dir whose files can be read, by name."""
    found = []
    for folder in _studies(output_dir):
        try:
            found.append(standing(folder))
        # `unreadable` tells of these
        except CommandRefused:
            continue
    return found


def unreadable(output_dir: Path) -> list[str]:
    """Return a message for each status file that cannot be read."""
    problems = []
    for folder in _studies(output_dir):
        try:
            standing(folder)
        except CommandRefused as refusal:
            problems.append(str(refusal))
    return problems


def silent(output_dir: Path) -> list[str]:
    """Return the names of studies that have results but no status file."""
    named = {found.study_name for found in standings(output_dir)}
    return sorted({path.parent.name for path in output_dir.glob("*/results.json")} - named)


def values_of(texts: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE arguments as a mapping.

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
        raise CommandRefused(f"the values are longer than {MAX_BYTES // 2} characters in all")
    return values


def steer(folder: StudyFolder, command: StudyCommand, timeout_s: float) -> CommandReply:
    """Send a command and wait at most `timeout_s` seconds for the driver's answer."""
    driven = is_driven(folder)
    if not driven and isinstance(command, TO_A_DRIVER):
        return CommandReply(
            REFUSED, f"the study is not running, so there is nothing to {command.verb}"
        )
    # a driver that starts just now reads it as a command that was kept
    identity = send(folder, command)
    if not driven:
        return CommandReply(
            KEPT,
            f"the study is not running. The command is kept for its next start:{_start(folder)}",
        )
    answer = _wait(folder, identity, timeout_s)
    if answer is not None:
        return CommandReply(APPLIED if answer.ok else REFUSED, answer.text)
    if is_driven(folder):
        return CommandReply(
            KEPT,
            f"no answer within {timeout_s:g} s (a driver that waits for its database answers later). "
            "The command is kept, and obeyed as soon as it is read",
        )
    if isinstance(command, TO_A_DRIVER):
        withdraw(folder, identity)
        return CommandReply(REFUSED, "the study's driver ended before it read the command")
    return CommandReply(
        KEPT, f"the driver has ended. The command is kept for the next start:{_start(folder)}"
    )


def _wait(folder: StudyFolder, identity: str, timeout_s: float) -> CommandAnswer | None:
    """Return the answer, or None when the time is over or the driver gone."""
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
