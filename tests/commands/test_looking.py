"""Looking at studies needs no right to write, and what stands in the way is told in a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.driver.command_files import CommandInbox
from sweeper.reporting.study_status import is_driven
from tests.conftest import Program

STANDING = """{"study_name": "mine", "state": "running", "command": "-m", "since": "2026-01-01 00:00:00",
"process": 1, "host": "h", "objective": {"metric": "eval/loss", "direction": "minimize",
"pruning_metric": null}, "left": "", "arms": [{"name": "lora", "wanted": 1, "done": 0,
"trials": {}, "best": null, "queue": []}], "running": []}"""


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """A study that a driver has opened."""
    found = StudyFolder(tmp_path / "outputs" / "mine")
    write_atomic(found.standing, STANDING)
    found.lock.touch()
    return found


def _without_writing(patch: pytest.MonkeyPatch) -> None:
    """Refuse every open that could write, as for another user or on a read-only disk."""
    opened = os.open

    def refuse(path: Any, flags: int, *words: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *words, **more)

    patch.setattr(os, "open", refuse)


@pytest.mark.parametrize("held", [True, False])
def test_a_look_opens_nothing_for_writing(
    folder: StudyFolder, held: bool, monkeypatch: pytest.MonkeyPatch, in_process: Program
) -> None:
    """Another user sees whether the study runs, while it runs and afterwards."""
    lock = FileLock(folder.lock, timeout=0)
    with lock if held else FileLock(folder.path / "other"):
        _without_writing(monkeypatch)
        assert is_driven(folder) is held
        shown = in_process("study", "show", "mine")
        listed = in_process("study", "list")
    assert (shown.returncode, listed.returncode) == (0, 0), shown.stderr + listed.stderr
    assert ("running" if held else "killed") in shown.stdout


def test_lookers_do_not_disturb_each_other(folder: StudyFolder) -> None:
    """A look never takes the lock away from a driver, nor from another look."""
    import fcntl

    with folder.lock.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert is_driven(folder) is False


@pytest.mark.parametrize("what", ["lock", "standing", "results", "inbox", "study"])
def test_what_stands_in_the_way_is_a_sentence(
    folder: StudyFolder, what: str, in_process: Program
) -> None:
    """A folder in the place of a file, a file in the place of a folder: no verb ends in a traceback."""
    place: dict[str, Callable[[], object]] = {
        "lock": lambda: (folder.lock.unlink(), folder.lock.mkdir()),
        "standing": lambda: (folder.standing.unlink(), folder.standing.mkdir()),
        "results": folder.results.mkdir,
        "inbox": lambda: folder.inbox.write_text("x"),
        "study": lambda: (folder.path.parent / "file").write_text("x"),
    }
    place[what]()
    for words in (
        *(["study", "list"], ["study", "show", "mine"], ["study", "pause", "mine"]),
        *(["study", "extend", "mine", "--trials", "1"], ["report", "mine"], ["best", "mine"]),
        *(["clean", "mine", "tracking=none"], ["study", "show", "file"], ["report", "file"]),
    ):
        done = in_process(*words)
        assert done.returncode in (0, 1, 2, 3), (words, done.stderr)
        assert done.returncode == 0 or done.stderr or done.stdout, words


def test_an_inbox_that_becomes_a_file_ends_no_study(folder: StudyFolder) -> None:
    """Nothing arrives any more, and the study goes on."""
    inbox = CommandInbox(folder)
    folder.inbox.rmdir()
    folder.inbox.write_text("x")
    assert list(inbox.letters()) == []


def test_an_error_of_the_system_is_a_sentence_with_advice(
    folder: StudyFolder, in_process: Program
) -> None:
    """At the entry point, for every command: the file, the reason, and what to do."""
    folder.inbox.write_text("x")
    done = in_process("study", "extend", "mine", "--trials", "1")
    assert done.returncode == 1
    assert "inbox: " in done.stderr
    assert "Move it away" in done.stderr
