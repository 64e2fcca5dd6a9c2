"""Keep a JSON document in the user's cache under a digest of everything that it is made of.

A file that is missing, damaged or of other inputs costs only the making. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from sweeper.core.paths import write_atomic

KEPT_FILES = 8
"""Number of documents of one kind that are kept: one for each Python build and version of the code."""

log = logging.getLogger(__name__)


def kept_document(kind: str, digest: str, make: Callable[[], Any]) -> Any:
    """Return a document from the cache, or make it and put it there.

    Args:
        kind: Name of the document, and of its folder in the cache.
        digest: The sha256 over all inputs of `make` and over its code.
        make: Function that returns the document, which JSON can hold without a loss.
    """
    path = Path(platformdirs.user_cache_dir("sweeper")) / kind / f"{digest}.json"
    if (found := _read(path)) is not None:
        return found
    document = make()
    try:
        content = json.dumps(document, ensure_ascii=False)
        write_atomic(path, f"{_checksum(content)}\n{content}\n")
        for old in sorted(path.parent.glob("*.json"), key=_modified)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot write the cache %s: %s", path.parent, error)
    return document


def _read(path: Path) -> Any:
    """Return a stored document, or None for a file that is missing or damaged."""
    try:
        checksum, _, content = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    content = content.removesuffix("\n")
    return json.loads(content) if checksum == _checksum(content) else None


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has removed the file
        return 0.0
