"""What is moved in a study's folder is neither lost nor mixed, whatever stops the driver in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder, TrialFolder, write_atomic
from sweeper.core.trial_identity import TrialIdentity, write_identity
from sweeper.driver.folder_owner import record_owner, settle_owner

MINE, OTHER = "a" * 32, "b" * 32


class Killed(BaseException):
    """Stands for kill -9."""


def _study(path: Path, study: str | None, text: str) -> StudyFolder:
    """A study's folder with two arms, an answer and a ledger."""
    folder = StudyFolder(path)
    for arm in ("full", "lora", "driver"):
        write_atomic(folder.trial(arm, 0).outcome, text)
    for name in ("figures/loss.svg", ".tracking/study.json", "results.json", "report.md"):
        write_atomic(folder.path / name, text)
    if study is not None:
        record_owner(folder, study)
    return folder


def _content(folder: StudyFolder) -> dict[str, str]:
    """The files of a study by their places, without what lies aside."""
    paths = (path for path in sorted(folder.path.rglob("*")) if path.is_file())
    found = {path.relative_to(folder.path).as_posix(): path.read_text() for path in paths}
    return {name: text for name, text in found.items() if not name.startswith("set_aside/")}


def _kill_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the driver at its call-th change of the file system, or never after the last one."""
    left = [call]

    def counted(module: object, name: str) -> None:
        real = getattr(module, name)

        def change(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(module, name, change)

    for module, name in ((Path, "replace"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink")):
        counted(module, name)
    for name in ("copy2", "copytree", "rmtree"):
        counted(shutil, name)


@pytest.mark.parametrize("stopped", ["leaving", pytest.param("returning", marks=pytest.mark.slow)])
@pytest.mark.parametrize("other_first", [False, True])
def test_a_kill_at_any_moment_of_a_move_loses_and_mixes_nothing(
    stopped: str, other_first: bool, tmp_path: Path
) -> None:
    """Killed at each change of the file system: both studies find their own files again."""
    moments = 0
    for call in range(100):
        folder = _study(tmp_path / str(call), MINE, "mine")
        mine = _content(folder)
        if stopped == "returning":
            settle_owner(folder, OTHER, opened=True)
            _study(folder.path, OTHER, "other")
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(call, patch)
            try:
                study = MINE if stopped == "returning" else OTHER
                settle_owner(folder, study, opened=True)
                break
            except Killed:
                moments += 1
        if other_first:
            settle_owner(folder, OTHER, opened=True)
            left = _content(folder)
            assert "mine" not in {left[name] for name in left if "/trial_" in name}
        settle_owner(folder, MINE, opened=True)
        assert _content(folder) == mine
        if stopped == "returning":
            settle_owner(folder, OTHER, opened=True)
            assert set(_content(folder).values()) == {"other", f'{{"study":"{OTHER}"}}\n'}
    assert moments > 8


def _is_a_file(folder: StudyFolder) -> None:
    folder.set_aside.write_text("")


def _is_unreadable(folder: StudyFolder) -> None:
    write_atomic(folder.set_aside / "move.json", "{")


def _is_a_folder(folder: StudyFolder) -> None:
    folder.identity.unlink()
    folder.identity.mkdir()


@pytest.mark.parametrize("spoil", [_is_a_file, _is_unreadable, _is_a_folder])
def test_a_move_that_is_not_possible_is_refused_in_words(spoil: object, tmp_path: Path) -> None:
    """Nothing is continued: the start ends with a sentence that names the folder."""
    folder = _study(tmp_path / "mine", MINE, "mine")
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(StudyError, match="mine"):
        settle_owner(folder, OTHER, opened=True)
    assert folder.trial("lora", 0).outcome.exists()


def test_a_full_disk_ends_the_move_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of the answer do not fit: refused, and the next start ends the move."""
    folder = _study(tmp_path / "mine", MINE, "mine")
    mine = _content(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", full)
        with pytest.raises(StudyError, match="No space left"):
            settle_owner(folder, OTHER, opened=True)
    settle_owner(folder, OTHER, opened=True)
    assert not (folder.path / "lora").exists()
    settle_owner(folder, MINE, opened=True)
    assert _content(folder) == mine


def test_a_study_without_a_uuid_gets_its_trials_back(tmp_path: Path) -> None:
    """An older version's study, another storage for once: it does not take the other's trials."""
    folder = _study(tmp_path / "mine", None, "mine")
    mine = _content(folder)
    other, _ = settle_owner(folder, None, opened=False)
    _study(folder.path, other, "other")
    study, words = settle_owner(folder, None, opened=True)
    assert study != other
    assert _content(folder) == mine
    assert "moved back" in words[-1]


def test_a_damaged_identity_of_a_folder_is_found_in_its_trials(tmp_path: Path) -> None:
    """identity.json is empty: the trials name their study, which gets them back."""
    folder = _study(tmp_path / "mine", MINE, "mine")
    trial = TrialIdentity(study=MINE, trial="lora/0000", seed=0, settings="")
    write_identity(TrialFolder(folder.path / "lora" / "trial_0000"), trial)
    folder.identity.write_text("")
    mine = _content(folder)
    settle_owner(folder, OTHER, opened=True)
    assert not (folder.path / "lora").exists()
    settle_owner(folder, MINE, opened=True)
    assert _content(folder) == mine
