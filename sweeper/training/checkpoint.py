"""Find the checkpoint of an earlier attempt that a trial can resume from.

transformers writes a checkpoint file by file. A manifest of checksums is added last, so a checkpoint
without a manifest is incomplete, and one that differs from its manifest was damaged later.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sweeper.core.errors import ArtifactError
from sweeper.core.manifest import verify_manifest, write_manifest
from sweeper.core.paths import read_json


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of an earlier attempt."""

    path: Path
    step: int

    @property
    def best(self) -> Checkpoint:
        """The checkpoint with the best weights so far, which becomes the trial's result."""
        # transformers stores an absolute path as well, which is wrong once the trial's folder has moved
        step = read_json(self.path / "trainer_state.json")["best_global_step"]
        if step is None:
            return self
        return Checkpoint(self.path.with_name(f"checkpoint-{int(step)}"), int(step))


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete by writing its manifest."""
    write_manifest(checkpoint)


def remove_old(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints except the newest `keep` and the one of `best_step`."""
    for found in _newest_first(folder)[keep:]:
        if found.step != best_step:
            shutil.rmtree(found.path)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is undamaged, like the best one that it refers to."""
    return next((found for found in _newest_first(folder) if find_damage(found) is None), None)


def fall_back(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint and remove the newer ones, which are damaged.

    Returns:
        The checkpoint, or None, and one remark for each damaged checkpoint.
    """
    remarks: list[str] = []
    for found in _newest_first(folder):
        problem = find_damage(found)
        if problem is None:
            return found, remarks
        remarks.append(f"{found.path.name} is damaged ({problem})")
        shutil.rmtree(found.path)
    return None, remarks


def find_damage(checkpoint: Checkpoint) -> str | None:
    """Return a description of a checkpoint's damage, or None."""
    try:
        verify_manifest(checkpoint.path)
        if checkpoint.best != checkpoint:
            verify_manifest(checkpoint.best.path)
    except ArtifactError as error:
        first, *others = str(error).splitlines()
        return ", ".join(line.strip() for line in others) or first
    return None


def _newest_first(folder: Path) -> list[Checkpoint]:
    paths = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    found = [Checkpoint(path, int(path.name.rpartition("-")[2])) for path in paths]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)
