"""Files of commands to a running study and of their answers, as sender and driver agree on them.

A command is one JSON file renamed into the study's inbox/. Its answer has the same name in outbox/.
The sender writes the command and removes the answer, the driver does the rest. The module knows
neither Optuna nor the effect of a command (sweeper.driver.command_handler).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError

from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.value import FrozenValue

MAX_BYTES = 64 * 1024
"""Maximum size of a command file in bytes. A judgement: a command is a line, and a stray file is
not read."""
MAX_TRIALS = 100_000
"""Maximum number of trials of one `study extend`. A judgement: more are a slip of the keyboard."""
# the nanosecond of sending, by which names sort, and eight random digits
_ID = re.compile(r"[0-9]{20}-[0-9a-f]{8}")
_SUFFIX, _DAMAGED = ".json", ".damaged"

Number = Annotated[int, Field(ge=0)]


class PauseStudy(FrozenValue):
    """Let the running trials write a checkpoint, free the device's memory, start nothing."""

    verb: Literal["pause"] = "pause"


class ResumeStudy(FrozenValue):
    """Continue after a pause, or cancel a stop that still waits for trials."""

    verb: Literal["resume"] = "resume"


class StopStudy(FrozenValue):
    """Start no new trial and end. `now` ends the running trials as well, with a checkpoint."""

    verb: Literal["stop"] = "stop"
    now: bool = False


class StopTrial(FrozenValue):
    """End one trial for good."""

    verb: Literal["stop_trial"] = "stop_trial"
    trial: Number
    arm: str | None = None


class ExtendArm(FrozenValue):
    """Add to an arm's n_trials."""

    verb: Literal["extend"] = "extend"
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)]
    arm: str | None = None


class EnqueuePoint(FrozenValue):
    """Try a point next. The sampler draws the keys that it leaves open."""

    verb: Literal["enqueue"] = "enqueue"
    values: dict[str, str]
    arm: str | None = None


class CloneTrial(FrozenValue):
    """Try the point of an earlier trial next, with some values changed."""

    verb: Literal["clone"] = "clone"
    trial: Number
    values: dict[str, str]
    arm: str | None = None


StudyCommand = (
    PauseStudy | ResumeStudy | StopStudy | StopTrial | ExtendArm | EnqueuePoint | CloneTrial
)
TO_A_DRIVER = (PauseStudy, ResumeStudy, StopStudy)
"""Commands that are meant for the current driver only. Its successor refuses them."""
TO_A_SEARCH = (ExtendArm, EnqueuePoint, CloneTrial)
"""Commands that change what an arm tries."""
_COMMANDS: TypeAdapter[StudyCommand] = TypeAdapter(
    Annotated[StudyCommand, Field(discriminator="verb")]
)


class CommandAnswer(FrozenValue):
    """The answer to a command."""

    ok: bool
    text: str


@dataclass(frozen=True)
class CommandFile:
    """A command with its id, which names it in every file."""

    id: str
    command: StudyCommand


@dataclass
class CommandInbox:
    """The driver's side of the command files. Reading an empty inbox costs one directory listing."""

    folder: StudyFolder
    _left_alone: set[str] = field(default_factory=set)
    """Names of damaged files that could not be renamed."""

    def __post_init__(self) -> None:
        for path in (self.folder.inbox, self.folder.outbox):
            path.mkdir(parents=True, exist_ok=True)

    def letters(self, besides: Collection[str] = ()) -> Iterator[CommandFile | str]:
        """Yield the commands that have arrived, the oldest first, and a message for each damaged file.

        A damaged file is renamed, so that it is reported once. A file is read when it is asked for.

        Args:
            besides: ids of commands that are left unread.
        """
        for name in sorted(_names(self.folder.inbox)):
            if not name.endswith(_SUFFIX) or name.startswith(".") or name in self._left_alone:
                continue
            if name.removesuffix(_SUFFIX) in besides:
                continue
            path = self.folder.inbox / name
            try:
                yield CommandFile(_id_of(name), _COMMANDS.validate_json(_content(path)))
            except FileNotFoundError:
                continue  # withdrawn meanwhile
            except (OSError, ValueError) as error:
                yield self._set_aside(path, error)

    def answer(self, letter: CommandFile, answer: CommandAnswer) -> None:
        """Write the answer, then remove the command. A driver killed in between answers again."""
        write_atomic(self.folder.outbox / f"{letter.id}{_SUFFIX}", answer.model_dump_json())
        (self.folder.inbox / f"{letter.id}{_SUFFIX}").unlink(missing_ok=True)

    def forget_answers(self) -> None:
        """Remove answers that their senders did not wait for."""
        for name in _names(self.folder.outbox):
            (self.folder.outbox / name).unlink(missing_ok=True)

    def _set_aside(self, path: Path, error: Exception) -> str:
        aside = path.with_name(path.name + _DAMAGED)
        try:
            path.replace(aside)
        except OSError:
            self._left_alone.add(path.name)
            aside = path
        return f"inbox/{path.name} is no command ({_reason(error)}). It is left as {aside.name}"


def send(folder: StudyFolder, command: StudyCommand) -> str:
    """Put a command into a study's inbox and return its id. Ids sort by the time of sending."""
    identity = f"{time.time_ns():020d}-{uuid4().hex[:8]}"
    write_atomic(folder.inbox / f"{identity}{_SUFFIX}", command.model_dump_json())
    return identity


def take_answer(folder: StudyFolder, identity: str) -> CommandAnswer | None:
    """Return the answer to a command and remove its file, or return None while there is none."""
    path = folder.outbox / f"{identity}{_SUFFIX}"
    try:
        answer = CommandAnswer.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        answer = CommandAnswer(ok=False, text=f"the answer in {path} is damaged: look at the study")
    path.unlink(missing_ok=True)
    return answer


def withdraw(folder: StudyFolder, identity: str) -> None:
    """Remove a command that the driver has not read yet."""
    (folder.inbox / f"{identity}{_SUFFIX}").unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - once a loop, and names are all that is needed
    except OSError:  # also a file where the folder was: nothing can arrive there
        return []


def _id_of(name: str) -> str:
    identity = name.removesuffix(_SUFFIX)
    if not _ID.fullmatch(identity):
        raise ValueError("its name is not that of a command")
    return identity


def _content(path: Path) -> bytes:
    """Read a file without ever waiting: pipes, devices and links in the inbox are refused."""
    if path.is_symlink() or not path.is_file():
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(path)
        raise ValueError("it is no plain file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return path.read_bytes()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join([*map(str, first["loc"]), first["msg"]])
    return str(error).splitlines()[0]
