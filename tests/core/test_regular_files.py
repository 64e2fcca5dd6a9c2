"""What only looks like a file is recognised without being opened."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from sweeper.core.regular_files import irregular, irregular_in


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


WORDS = {
    "pipe": (_pipe, r"entry is a named pipe \(FIFO\), not a regular file\. Put a copy"),
    "socket": (_socket, "entry is a socket, not"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "is a link to /dev/zero, a device, not"),
    "link": (_link_to_a_pipe, r"is a link to .*pipe, a named pipe"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_what_is_no_file_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe, a socket and a device, also behind a link, alone and in a folder."""
    make, words = WORDS[kind]
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")  # the path of a socket has at most 107 characters
    make(tmp_path / "folder" / "entry")
    assert re.search(words, str(irregular(tmp_path / "folder" / "entry")))
    assert irregular_in(tmp_path / "folder") is not None
    assert irregular_in(tmp_path) is None
    assert irregular_in(tmp_path, ("folder",)) is not None


def test_files_folders_and_what_is_missing_pass(tmp_path: Path) -> None:
    """The reader of a broken link or of a missing file says more than this module could."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "folder").mkdir()
    names = ("file", "link", "circle", "folder", "missing", "a\0b")
    assert [irregular(tmp_path / name) for name in names] == [None] * len(names)
    assert irregular_in(tmp_path) is None
    assert irregular_in(tmp_path / "missing") is None
