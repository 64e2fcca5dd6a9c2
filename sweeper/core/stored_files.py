"""Read files that this program wrote before, and that a power cut may have damaged.

A damaged file is taken for missing: the reader says once which file, what is wrong with it, and what
is lost. Files that no work can do without raise an error instead, where they are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sweeper.core.errors import first_line
from sweeper.core.steady_output import echo

Stored = TypeVar("Stored", bound=BaseModel)

_TOLD: set[str] = set()
"""Files and lines that were told of, each once in a process."""


def read_stored(path: Path, kind: type[Stored], lost: str) -> Stored | None:
    """Return what a file holds, or None if it is missing or damaged.

    Args:
        path: the file.
        kind: the class of its content.
        lost: what follows from its loss, as in "the trial is trained again".
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        tell_damage(path, error, lost)
        return None


def read_object(path: Path, lost: str) -> dict[str, Any]:
    """Return a JSON object, or {} if the file is missing or damaged. See read_stored."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} instead of an object")
    except FileNotFoundError:
        return {}
    # RecursionError: JSON may nest deeper than Python reads.
    except (OSError, ValueError, RecursionError) as error:
        tell_damage(path, error, lost)
        return {}
    return found


def read_words(path: Path) -> str:
    """Return a text, with a mark for every byte that is none, or "" if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def tell_damage(path: Path, error: Exception, lost: str) -> None:
    """Print once that a file, or a line of it, is damaged."""
    text = f"{path} is damaged ({damage(error)}): {lost}"
    if text not in _TOLD:
        _TOLD.add(text)
        echo(text, stderr=True)


def damage(error: Exception) -> str:
    """Return what is wrong with a file, in a few words."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, found["loc"])) or "the file"
        return f"{place}: {found['msg']}"
    return first_line(error)[:200]
