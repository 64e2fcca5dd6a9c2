"""Build a folder out of sight and put it in place when it is whole, with errors that are sentences.

Used by the tools that write models and data. Does not know what they write.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sweeper.core.errors import SweeperError, sentence

CARD = "README.md"


class OccupiedFolder(SweeperError):
    """The folder to write holds something that the tool has not written."""


class DiskTooSmall(SweeperError):
    """The disk has less space than the build needs."""


@contextmanager
def built_folder(out: Path, kind: str, mark: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when the block ends without an error.

    Args:
        out: Folder to write. An earlier build there is replaced.
        kind: Name of what is built, for the message: `an embedded base`.
        mark: Text of the card README.md by which an earlier build is recognised.

    Raises:
        OccupiedFolder: `out` holds anything but an earlier build.
    """
    _refuse_other_folder(out, kind, mark)
    out.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk as `out`: a rename is then all that a reader can see of the build.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        fresh = Path(folder, "fresh")
        fresh.mkdir()
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():  # a folder without the x bit could not be entered
                file.chmod(0o644)  # safetensors writes 0600, which a wheel would carry along
        if out.exists():
            out.rename(Path(folder, "earlier"))
        fresh.rename(out)


def require_space(folder: Path, needed: int) -> None:
    """Raise DiskTooSmall if the disk of `folder` has less than `needed` free bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskTooSmall(
            f"the disk of {str(folder)!r} has {free / 1e6:,.0f} MB free, and {needed / 1e6:,.0f} MB "
            "are needed. Free space, or name a folder on another disk (--out, --wheels)."
        )


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the program with status 1 and one sentence on stderr for an error that a user can mend."""
    try:
        yield
    except OSError as error:
        sys.exit(f"error: {sentence(error)}")
    except SweeperError as error:
        sys.exit(f"error: {error}")


def _refuse_other_folder(out: Path, kind: str, mark: str) -> None:
    card = out / CARD
    if card.is_file() and mark in card.read_text(encoding="utf-8"):
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OccupiedFolder(
            f"{kind} may only be written to a new or empty folder, or over an earlier one: "
            f"out={str(out)!r} holds something else. Choose another folder, or empty this one."
        )
