"""manifest.json: the sha256 and size of every file of an artifact, and the check against it.

Knows no torch; whoever receives an adapter can verify it without loading it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sweeper.core.errors import ArtifactError
from sweeper.core.paths import read_json, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write `folder`/manifest.json over all other files below it."""
    write_json(folder / MANIFEST, {"files": _entries(folder)})


def verify_manifest(folder: Path) -> None:
    """Check that a folder holds exactly the files of its manifest, unchanged.

    Raises:
        ArtifactError: names every file that is missing, changed or not in the manifest.
    """
    path = folder / MANIFEST
    try:
        listed = dict(read_json(path)["files"])
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; it was not written to its end") from None
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise ArtifactError(f"{path}: no manifest that can be read ({error})") from None
    found = _entries(folder)
    problems = [
        *(f"{name}: missing" for name in listed if name not in found),
        *(f"{name}: not in the manifest" for name in found if name not in listed),
        *(f"{name}: changed" for name in listed if name in found and listed[name] != found[name]),
    ]
    if problems:
        raise ArtifactError(f"{folder} is not what was stored:\n  " + "\n  ".join(problems))


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in files
        if path != folder / MANIFEST
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
