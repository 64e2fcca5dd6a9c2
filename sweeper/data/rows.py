"""Read: files into rows (dicts), with the file and line of whatever is wrong.

datasets' own JSON reader names neither file nor line, so local files are read here; formats and
columns are the next stage's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweeper.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json")


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl file (one object a line) or a .json file (one list of objects).

    Raises:
        DataError: no such file, another kind of file, broken JSON, not UTF-8, or no rows.
    """
    if problem := path_problem(path):
        raise DataError(problem)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None
    rows = list(_json_lines(path, text) if path.suffix == ".jsonl" else _json_list(path, text))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def path_problem(path: Path) -> str | None:
    """Why a path cannot be a data file, as far as that is known without opening it."""
    if not path.is_file():
        return f"{path}: no such file"
    if path.suffix not in SUFFIXES:
        return f"{path}: a {path.suffix or 'nameless'} file; give {' or '.join(SUFFIXES)}"
    return None


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _json_list(path: Path, text: str) -> Iterator[Row]:
    value = _parse(text, str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: a {type(value).__name__}, not a list of rows")
    for number, item in enumerate(value, start=1):
        yield _object(item, f"{path}: row {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = text[:80] + ("…" if len(text) > 80 else "")
        raise DataError(
            f"{where}: broken JSON ({error.msg} at column {error.colno}): {shown}"
        ) from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, not a JSON object")
    return value
