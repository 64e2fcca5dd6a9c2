"""What the building tools share: a folder appears whole or not at all, and errors are sentences."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sweeper.core.errors import DataError
from tools.guarded_build import (
    DiskTooSmall,
    OccupiedFolder,
    built_folder,
    errors_as_sentences,
    require_space,
)

MARK = "python -m tools.example"


def write(out: Path, text: str) -> None:
    """Build a folder with one file and a card."""
    with built_folder(out, "an example", MARK) as fresh:
        (fresh / "README.md").write_text(MARK, encoding="utf-8")
        (fresh / "text").write_text(text, encoding="utf-8")


def fill_the_disk(out: Path) -> None:
    """Begin a build whose disk is full in the middle."""
    with built_folder(out, "an example", MARK) as fresh:
        (fresh / "text").write_text("second", encoding="utf-8")
        raise OSError(errno.ENOSPC, "disk full")


def test_a_later_build_replaces_an_earlier_one(tmp_path: Path) -> None:
    """The second build's files stand at the folder's place, and nothing else is left beside them."""
    out = tmp_path / "nested" / "out"
    write(out, "first")
    write(out, "second")
    assert (out / "text").read_text(encoding="utf-8") == "second"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_everybody_reads_a_build(tmp_path: Path) -> None:
    """Files can be read by all, also in folders of the build, and the folders can be entered."""
    out = tmp_path / "out"
    with built_folder(out, "an example", MARK) as fresh:
        (fresh / "parts").mkdir()
        (fresh / "parts" / "weights").touch(0o600)
    assert (out / "parts" / "weights").stat().st_mode & 0o777 == 0o644
    assert (out / "parts").stat().st_mode & 0o100


def test_a_build_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    """An error in the middle keeps the earlier folder and removes the new files."""
    out = tmp_path / "out"
    write(out, "first")
    with pytest.raises(OSError, match="disk full"):
        fill_the_disk(out)
    assert (out / "text").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """A folder with other files, or a file, is neither replaced nor touched."""
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(OccupiedFolder, match="an example may only be written"):
            write(out, "first")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_disk_that_is_too_small_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free and needed megabytes are in the message, also for a folder that does not exist yet."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000))
    require_space(tmp_path / "new", 5_000_000)
    with pytest.raises(DiskTooSmall, match="5 MB free, and 900 MB are needed"):
        require_space(tmp_path / "new", 900_000_000)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
            "error: model.safetensors: no space left on device. Free space",
        ),
        (DataError("the file is empty"), "error: the file is empty"),
    ],
)
def test_an_error_ends_the_tool_with_one_sentence(error: Exception, message: str) -> None:
    """A full disk and an error of ours give a status and a sentence, not a traceback."""
    with pytest.raises(SystemExit) as raised, errors_as_sentences():
        raise error
    assert str(raised.value.code).startswith(message)


def test_an_error_in_the_code_keeps_its_traceback() -> None:
    """Anything that no user can mend is raised as it is."""
    with pytest.raises(ZeroDivisionError), errors_as_sentences():
        print(1 / 0)
