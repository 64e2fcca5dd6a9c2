"""Write and verify manifest.json: the sha256 and size of every file of an artifact.

Imports no torch, so an adapter can be verified without being loaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sweeper.core.errors import ArtifactError
from sweeper.core.paths import read_json, write_json

MANIFEST = "manifest.json"
# The manifest is inside the artifact's own folder, so that zip files, MLflow and copies include it.


def write_manifest(folder: Path) -> None:
    """Write manifest.json of all other files in the folder and its subfolders."""
    write_json(folder / MANIFEST, {"files": _entries(folder)})


def renew_entry(folder: Path, name: str) -> None:
    """Record one file's present content in the manifest. The other entries stay as they are.

    Raises:
        ArtifactError: The manifest is missing or unreadable.
    """
    # New entries of all files would declare a file whole that was damaged in the meantime.
    files = _listed(folder)
    if files.get(name) != (entry := _entry(folder / name)):
        write_json(folder / MANIFEST, {"files": {**files, name: entry}})


def verify_manifest(folder: Path) -> None:
    """Check that a folder holds exactly the files of its manifest, unchanged.

    Raises:
        ArtifactError: The manifest is missing or unreadable, or the files differ. The message names
            every file that is missing, changed or not in the manifest.
    """
    listed, found = _listed(folder), _entries(folder)
    problems = [
        *(f"{name}: missing" for name in listed if name not in found),
        *(f"{name}: not in the manifest" for name in found if name not in listed),
        *(f"{name}: changed" for name in listed if name in found and listed[name] != found[name]),
    ]
    if problems:
        raise ArtifactError(f"{folder} differs from its manifest:\n  " + "\n  ".join(problems))


def _listed(folder: Path) -> dict[str, Any]:
    """Return the entries of a manifest by file name."""
    path = folder / MANIFEST
    try:
        return dict(read_json(path)["files"])
    except FileNotFoundError:
        # The manifest is written last.
        raise ArtifactError(f"{path}: missing, so the folder was not written completely") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: cannot be read as a manifest ({error})") from None


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in files
        if path != folder / MANIFEST
    }


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
