"""Moves of a study's files inside its folder, each to its end although a driver may be killed in it.

A move is stored before its first file is touched. The next start ends what it finds stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder, path_inside, write_atomic
from sweeper.core.stored_files import damage
from sweeper.core.value import FrozenValue


def _entry_name(name: str) -> str:
    if name in (".", ".."):
        raise ValueError("is no name of an entry of a folder")
    return name


EntryName = Annotated[str, Field(pattern=r"^[^/\x00]+$"), AfterValidator(_entry_name)]


class FolderMove(FrozenValue):
    """The content of set_aside/move.json."""

    source: str
    """A folder, relative to the study's."""
    target: str
    """Another one, which is made."""
    moved: tuple[EntryName, ...]
    """Names of what is moved."""
    copied: tuple[EntryName, ...] = ()
    """Names of what is copied."""
    emptied: bool = False
    """True if the source is deleted once everything was moved out of it."""

    def places(self, folder: StudyFolder) -> tuple[Path, Path]:
        """Return source and target.

        Raises:
            ValueError: one of them lies outside the study's folder, or the study's would be deleted.
        """
        source, target = (path_inside(folder.path, name) for name in (self.source, self.target))
        if self.emptied and source.resolve() == folder.path.resolve():
            raise ValueError(f"{self.source!r} is the study's own folder")
        return source, target


def move_content(folder: StudyFolder, move: FolderMove) -> None:
    """Store a move, and make it."""
    write_atomic(_stored(folder), move.model_dump_json() + "\n")
    end_move(folder)


def end_move(folder: StudyFolder) -> None:
    """Make the move that is stored, from wherever an earlier driver was stopped in it.

    Raises:
        StudyError: the stored move cannot be read.
    """
    path = _stored(folder)
    try:
        move = FolderMove.model_validate_json(path.read_bytes())
        source, target = move.places(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:
        raise StudyError(
            f"{path} says which trials of {folder.path} are being moved, and cannot be read "
            f"({damage(error)}). Move the trials by hand, and delete the file"
        ) from None
    target.mkdir(parents=True, exist_ok=True)
    for each in _present(source, move.copied):
        _copy(each, target / each.name)
    for each in _present(source, move.moved):
        # a folder cannot be renamed onto one that is not empty
        _clear(target / each.name)
        each.replace(target / each.name)
    if move.emptied and _is_empty(source, folder):
        shutil.rmtree(source, ignore_errors=True)
    path.unlink()


def _stored(folder: StudyFolder) -> Path:
    return folder.set_aside / "move.json"


def _present(source: Path, names: Iterable[str]) -> list[Path]:
    """Return what is still there. A link may lead nowhere."""
    paths = [source / name for name in names]
    return [path for path in paths if path.exists() or path.is_symlink()]


def _is_empty(source: Path, folder: StudyFolder) -> bool:
    """Return True if a folder holds nothing but the locks of `sync`, which are not moved."""
    locks = (folder.lock.name, folder.lock.with_suffix(".pid").name)
    return source.is_dir() and all(path.name in locks for path in source.iterdir())


def _copy(path: Path, copy: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, copy, dirs_exist_ok=True)
    else:
        shutil.copy2(path, copy)


def _clear(target: Path) -> None:
    """Make room for a folder: figures, of which the other study has a copy."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
