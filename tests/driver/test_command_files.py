"""Commands and answers as files: what is read, what is set aside, and by whom."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sweeper.core.paths import StudyFolder
from sweeper.driver.command_files import (
    MAX_BYTES,
    CommandAnswer,
    CommandFile,
    CommandInbox,
    EnqueuePoint,
    ExtendArm,
    PauseStudy,
    ResumeStudy,
    send,
    take_answer,
    withdraw,
)

NAME = "00000000000000000001-0123abcd.json"


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Of a study without a driver."""
    return StudyFolder(tmp_path / "study")


def test_commands_are_read_in_the_order_they_were_sent(folder: StudyFolder) -> None:
    """Three commands come out as they went in."""
    commands = [
        PauseStudy(),
        ExtendArm(trials=3, arm="full"),
        EnqueuePoint(values={"adapter.r": "4"}),
    ]
    sent = [send(folder, command) for command in commands]
    letters = list(CommandInbox(folder).letters())
    assert letters == [CommandFile(*pair) for pair in zip(sent, commands, strict=True)]


def test_an_answer_is_taken_once_and_the_command_is_gone(folder: StudyFolder) -> None:
    """The driver removes the command, whoever asked removes the answer."""
    inbox, identity = CommandInbox(folder), send(folder, ResumeStudy())
    assert take_answer(folder, identity) is None
    (letter,) = inbox.letters()
    assert isinstance(letter, CommandFile)
    inbox.answer(letter, CommandAnswer(ok=True, text="it goes on"))
    assert list(inbox.letters()) == []
    assert take_answer(folder, identity) == CommandAnswer(ok=True, text="it goes on")
    assert take_answer(folder, identity) is None


def test_a_withdrawn_command_is_not_read(folder: StudyFolder) -> None:
    """Taken back before the driver looked."""
    withdraw(folder, send(folder, PauseStudy()))
    assert list(CommandInbox(folder).letters()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ('{"verb": "explode"}', "explode"),
        ('{"verb": "extend", "trials": -1}', "greater than or equal to 1"),
        ('{"verb": "extend", "trials": 1, "arm": null, "shell": "rm -rf"}', "not permitted"),
        ('{"verb": "pause"}' + " " * MAX_BYTES, "larger than"),
        ("[1, 2]", "should be an object"),
        ("\x00\xff", "JSON"),
    ],
)
def test_damaged_commands_are_set_aside_with_a_word(
    folder: StudyFolder, content: str, reason: str
) -> None:
    """Met once, kept for whoever wants to look, and nothing else is lost."""
    inbox = CommandInbox(folder)
    (folder.inbox / NAME).write_text(content, encoding="latin-1")
    good = send(folder, PauseStudy())
    words, letter = inbox.letters()
    assert isinstance(words, str)
    assert reason in words
    assert f"{NAME}.damaged" in words
    assert letter == CommandFile(good, PauseStudy())
    assert list(inbox.letters()) == [letter]
    assert (folder.inbox / f"{NAME}.damaged").exists()


@pytest.mark.parametrize("name", ["pause.json", "..json", "00000000000000000001-0123ABCD.json"])
def test_a_name_of_no_command_is_set_aside(folder: StudyFolder, name: str) -> None:
    """Answers are files of the same name, so a name is not anything a stranger likes."""
    inbox = CommandInbox(folder)
    (folder.inbox / name).write_text('{"verb": "pause"}')
    if name.startswith("."):
        assert list(inbox.letters()) == []
    else:
        (words,) = inbox.letters()
        assert "its name is not that of a command" in words


def test_pipes_links_and_folders_do_not_hold_the_driver_up(folder: StudyFolder) -> None:
    """Opening a pipe would wait for ever; a link may lead out of the study."""
    inbox = CommandInbox(folder)
    os.mkfifo(folder.inbox / NAME)
    (folder.inbox / NAME.replace("1-", "2-")).mkdir()
    outside = folder.path / "outside.json"
    outside.write_text('{"verb": "pause"}')
    (folder.inbox / NAME.replace("1-", "3-")).symlink_to(outside)
    (folder.inbox / NAME.replace("1-", "4-")).symlink_to(folder.path / "nowhere")
    found = list(inbox.letters())
    assert len(found) == 4
    assert all(isinstance(words, str) and "no plain file" in words for words in found)
    assert outside.exists()


def test_a_file_that_cannot_be_renamed_is_met_once(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an inbox that somebody else owns the driver complains once, and goes on."""
    inbox = CommandInbox(folder)
    (folder.inbox / NAME).write_text("{")

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(Path, "replace", refuse)
    assert len(list(inbox.letters())) == 1
    assert list(inbox.letters()) == []


def test_half_written_files_are_not_met(folder: StudyFolder) -> None:
    """Names that begin with a dot are writes under way."""
    inbox = CommandInbox(folder)
    (folder.inbox / f".{NAME}.ab12").write_text("{")
    assert list(inbox.letters()) == []


def test_a_command_is_plain_json(folder: StudyFolder) -> None:
    """What the documentation shows is what is written."""
    identity = send(folder, ExtendArm(trials=5))
    text = (folder.inbox / f"{identity}.json").read_text()
    assert json.loads(text) == {"verb": "extend", "trials": 5, "arm": None}
