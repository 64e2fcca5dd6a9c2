"""Find out whether a study's folder belongs to the study that the storage holds.

They part when the storage is switched, or its database deleted, emptied or replaced. Then the content
of the folder is moved to `set_aside/studies/` under its own study's UUID. It is moved back when its
study is run again.
"""

from __future__ import annotations

import filecmp
import re
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from pydantic import Field

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder, TrialFolder, write_atomic
from sweeper.core.trial_identity import read_identity
from sweeper.core.value import FrozenValue
from sweeper.driver.folder_claims import free_path
from sweeper.driver.folder_moves import FolderMove, end_move, move_content
from sweeper.search.study import UUID_PATTERN

SHORT = 8
"""Characters of a UUID in the name of a folder."""
ARM_CONTENT = ("trial_*", "finalists", "adopted")
"""Patterns of what the folder of an arm contains."""
UNNAMED = "unnamed"
"""Place of a study that an older version stored without a UUID."""


class FolderOwner(FrozenValue):
    """The content of a study folder's identity.json."""

    study: str = Field(pattern=f"^{UUID_PATTERN}$")
    """The study's UUID, whose beginning is the name of a folder."""


def settle_owner(folder: StudyFolder, stored: str | None, *, opened: bool) -> tuple[str, list[str]]:
    """Return the UUID of the study that a folder belongs to from now on.

    Args:
        folder: the folder of the study's name.
        stored: the UUID in the study's attributes, or None if an older version stored the study.
        opened: True if the storage has an arm of the study.

    Returns:
        The UUID, and one message for each thing that was moved.

    Raises:
        StudyError: what belongs to another study cannot be moved.
    """
    try:
        end_move(folder)  # which a driver began that was killed
        return _settle(folder, stored, opened=opened)
    except OSError as error:
        raise StudyError(
            f"{folder.path} holds the trials of another study of this name, or lacks its own, and "
            f"they cannot be moved: {error}. The same command ends the move when that is mended. "
            f"Another study's folder: hydra.sweeper.study_name={folder.path.name}_2"
        ) from error


def _settle(folder: StudyFolder, stored: str | None, *, opened: bool) -> tuple[str, list[str]]:
    owner, nameless = _owner(folder), None
    if opened and stored is None:
        nameless = _nameless(folder)
    if opened:
        # an older version stored no UUID, so its study gets the one that its folder has
        ours = owner is None or owner == stored or (stored is None and nameless is None)
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
    back = nameless or _place(folder, study)
    if back.is_dir() and not _arms(folder):
        _set_aside(folder, owner=None)  # what a start left that ended before its first trial
        locks = (folder.lock.name, folder.lock.with_suffix(".pid").name)  # of `sync`, if any
        names = tuple(path.name for path in sorted(back.iterdir()) if path.name not in locks)
        place = str(back.relative_to(folder.path))
        move_content(folder, FolderMove(source=place, target=".", moved=names, emptied=True))
        words.append(f"the trials of this study were moved back from {back}")
    return study, words


def record_owner(folder: StudyFolder, study: str) -> None:
    """Store which study a folder belongs to."""
    if _owner(folder) != study:
        # A full disk: the storage has the UUID, and the next start stores it
        with suppress(OSError):
            write_atomic(folder.identity, FolderOwner(study=study).model_dump_json() + "\n")


def _owner(folder: StudyFolder) -> str | None:
    """Return the UUID of the study that wrote the folder, or None if it has none."""
    try:
        return FolderOwner.model_validate_json(folder.identity.read_bytes()).study
    except (FileNotFoundError, ValueError):
        # damaged, or never stored because the disk was full: the trials name their study as well
        trials = (path for arm in _arms(folder) for path in sorted(arm.rglob("trial_*")))
        own = (TrialFolder(path) for path in trials if path.is_dir() and not path.is_symlink())
        found = (read_identity(trial) for trial in own)
        return next((each.study for each in found if each is not None and each.study), None)


def _place(folder: StudyFolder, owner: str) -> Path:
    # a storage may hold anything in the place of a UUID
    return folder.set_aside / "studies" / re.sub(r"[^A-Za-z0-9_-]", "_", owner)[:SHORT]


def _nameless(folder: StudyFolder) -> Path | None:
    """Return where the trials of the one study without a UUID were moved to, if they were."""
    places = sorted((folder.set_aside / "studies").glob(f"{UNNAMED}*"))
    found = [place for place in places if place.is_dir() and _arms(StudyFolder(place))]
    return found[0] if len(found) == 1 else None


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
    place = free_path(_place(folder, owner or UNNAMED))
    answers = [path for path in folder.answers if path.exists()] if _is_new(folder, place) else []
    move = FolderMove(
        source=".",
        target=str(place.relative_to(folder.path)),
        moved=tuple(path.name for path in content),
        copied=tuple(path.name for path in answers),
    )
    move_content(folder, move)
    return place


def _is_new(folder: StudyFolder, place: Path) -> bool:
    """Return True if the folder's answer is not that of a study that was set aside before."""
    earlier = place.parent.glob(f"*/{folder.results.name}")
    return folder.results.exists() and not any(
        filecmp.cmp(folder.results, other, shallow=False) for other in earlier
    )
