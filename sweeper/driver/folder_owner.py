"""Find out whether a study's folder belongs to the study that the storage holds.

They part when the storage is switched, or its database deleted, emptied or replaced. Then the content
of the folder is moved to `set_aside/studies/` under its own study's UUID. It is moved back when its
study is run again.
"""

from __future__ import annotations

import filecmp
import re
import shutil
from pathlib import Path
from uuid import uuid4

from pydantic import Field

from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.value import FrozenValue
from sweeper.driver.folder_claims import free_path

SHORT = 8
"""Characters of a UUID in the name of a folder."""
ARM_CONTENT = ("trial_*", "finalists", "adopted")
"""Patterns of what the folder of an arm contains."""


class FolderOwner(FrozenValue):
    """The content of a study folder's identity.json."""

    study: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """The study's UUID, whose beginning is the name of a folder."""


def settle_owner(folder: StudyFolder, stored: str | None, *, opened: bool) -> tuple[str, list[str]]:
    """Return the UUID of the study that a folder belongs to from now on.

    Args:
        folder: the folder of the study's name.
        stored: the UUID in the study's attributes, or None if an older version stored the study.
        opened: True if the storage has an arm of the study.

    Returns:
        The UUID, and one message for each thing that was moved.
    """
    owner = _owner(folder)
    if opened:
        # an older version stored no UUID, so its study gets the one that its folder has
        ours = owner is None or stored is None or owner == stored
    else:
        ours = owner is None and not _arms(folder)
    study = stored or (owner if ours and owner else uuid4().hex)
    words = []
    if not ours:
        reason = "" if opened else ", which the storage does not hold"
        words.append(
            f"{folder.path} holds the trials of another study of this name{reason}. Moved to "
            f"{_set_aside(folder, owner)}. They are moved back when that study runs again"
        )
    back = _place(folder, study)
    if back.is_dir() and not _arms(folder):
        _set_aside(folder, owner=None)  # what a start left that ended before its first trial
        for path in sorted(back.iterdir()):
            _put_back(path, folder)
        shutil.rmtree(back)  # the locks of `sync`, if any
        words.append(f"the trials of this study were moved back from {back}")
    return study, words


def record_owner(folder: StudyFolder, study: str) -> None:
    """Store which study a folder belongs to."""
    if _owner(folder) != study:
        write_atomic(folder.identity, FolderOwner(study=study).model_dump_json() + "\n")


def _owner(folder: StudyFolder) -> str | None:
    try:
        return FolderOwner.model_validate_json(folder.identity.read_bytes()).study
    except (FileNotFoundError, ValueError):
        return None


def _place(folder: StudyFolder, owner: str) -> Path:
    # a storage may hold anything in the place of a UUID
    return folder.set_aside / "studies" / re.sub(r"[^A-Za-z0-9_-]", "_", owner)[:SHORT]


def _arms(folder: StudyFolder) -> list[Path]:
    """Return the folders of arms that hold anything."""
    arms = (path for path in sorted(folder.path.iterdir()) if path.is_dir())
    return [arm for arm in arms if any(next(arm.glob(each), None) for each in ARM_CONTENT)]


def _set_aside(folder: StudyFolder, owner: str | None) -> Path | None:
    """Move the content of a study away, and return its new place, or None without content.

    The answer is copied, because it stays until a new one replaces it.
    """
    logs = sorted(folder.path.glob("worker_*.log"))
    own = (folder.tracking, folder.steering, folder.standing, folder.identity, *logs)
    # only what a study writes: a user's storage may lie in the same folder
    content = [*_arms(folder), *(path for path in own if path.exists())]
    if not content:
        return None
    place = free_path(_place(folder, owner or "unnamed"))
    answers = [path for path in folder.answers if path.exists()] if _is_new(folder, place) else []
    place.mkdir(parents=True)
    for path in answers:
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, place / path.name)
    for path in content:
        path.rename(place / path.name)
    return place


def _is_new(folder: StudyFolder, place: Path) -> bool:
    """Return True if the folder's answer is not that of a study that was set aside before."""
    earlier = place.parent.glob(f"*/{folder.results.name}")
    return folder.results.exists() and not any(
        filecmp.cmp(folder.results, other, shallow=False) for other in earlier
    )


def _put_back(path: Path, folder: StudyFolder) -> None:
    target = folder.path / path.name
    if path.name.startswith(folder.lock.stem):
        return
    if target.is_dir():  # figures, of which the other study has a copy
        shutil.rmtree(target)
    path.replace(target)
