"""Resume state: which checkpoint of an earlier attempt is whole, and what was wrong with the others.

transformers writes a checkpoint file by file, so a manifest of checksums is added when it is done: a
checkpoint without one was not written to its end, one that differs from it was damaged since.
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
        """The checkpoint with the best weights so far, which the trial's end is taken from."""
        step = read_json(self.path / "trainer_state.json")["best_global_step"]
        return self if step is None else Checkpoint(self.path.with_name(f"checkpoint-{step}"), step)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as written to its end."""
    write_manifest(checkpoint)


def thin_out(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints, and the best one besides."""
    for found in _newest_first(folder)[keep:]:
        if found.step != best_step:
            shutil.rmtree(found.path)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, and the best one that it refers to as well."""
    return next((found for found in _newest_first(folder) if damage(found) is None), None)


def fall_back(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, alone: newer ones, which are damaged, are removed.

    Returns:
        The checkpoint, if there is one, and what was wrong with each that was passed over.
    """
    remarks: list[str] = []
    for found in _newest_first(folder):
        problem = damage(found)
        if problem is None:
            return found, remarks
        remarks.append(f"{found.path.name} is damaged ({problem})")
        shutil.rmtree(found.path)
    return None, remarks


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, if anything."""
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
