"""Recognise what only looks like a file: a pipe, a device or a socket, also behind a symbolic link.

Opening a pipe waits for its writer, and some devices never end. Nothing is opened here.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from pathlib import Path

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular(path: Path) -> str | None:
    """Return why a path cannot be read as a file, or None for files, folders and missing paths."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # its reader says what is wrong with the path
        return None
    kind = next((words for matches, words in _KINDS if matches(mode)), None)
    if kind is None:
        return None
    link = f"a link to {path.resolve()}, " if path.is_symlink() else ""
    return f"{path} is {link}{kind}, not a regular file. Put a copy of the content in its place"


def irregular_in(folder: Path, subfolders: Sequence[str] = ()) -> str | None:
    """Return why an entry of a folder cannot be read as a file, or None if all can.

    Args:
        folder: the folder, which need not exist. Only its own entries are looked at.
        subfolders: names of folders in it whose entries are looked at as well.
    """
    for place in (folder, *(folder / name for name in subfolders)):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                if problem := irregular(path):
                    return problem
    return None
