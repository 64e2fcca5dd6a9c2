"""Resume state: which checkpoint of an earlier attempt is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of an earlier attempt."""

    path: Path
    step: int


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint; transformers writes trainer_state.json last."""
    complete = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    found = [Checkpoint(path, int(path.name.rpartition("-")[2])) for path in complete]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)
