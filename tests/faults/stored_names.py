"""Every text of a study's own files, and hostile names to put into its place."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

CANARY = "canary-of-a-file-outside"
"""Text of the files outside, which no file inside may ever hold."""

_ID = re.compile(r"[0-9a-f]{32}")
"""An id of a study or a run, of which folders are named."""

Step = str | int
Parsed = Any


@dataclass(frozen=True)
class StoredText:
    """One text in a file: a value, or the key of an object."""

    file: str
    """The file, relative to the home folder of the studies."""
    cell: tuple[str, str, int] | None
    """Table, column and row of a database."""
    steps: tuple[Step, ...]
    """Keys and positions that lead to the text in the parsed file or cell."""
    is_key: bool
    text: str
    attribute: str = ""
    """The name of the attribute that a cell of a database holds, if its row has one."""

    @property
    def field(self) -> str:
        """The kind of the text: the same for all trials, all positions of a list and all rows."""
        steps = ".".join("*" if isinstance(step, int) else step for step in self.steps)
        table = "" if self.cell is None else f":{self.cell[0]}.{self.cell[1]} {self.attribute}"
        kind = " (key)" if self.is_key else ""
        numberless = re.sub(r"\d{4,}(-[0-9a-f]{8})?|[0-9a-f]{16,}", "#", f"{self.file}{table}")
        return f"{numberless}:{steps}{kind}"


def texts_of(home: Path, folder: Path) -> Iterator[StoredText]:
    """Yield every text of all files in a folder, one of each field."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            for text in _texts(home, path):
                if text.field not in seen:
                    seen.add(text.field)
                    yield text


def names_of(home: Path, texts: Iterable[StoredText]) -> list[StoredText]:
    """Return the texts that name a file or a folder in the home folder, whole or in a part."""
    paths = [path.relative_to(home) for path in home.rglob("*")]
    named = {part for path in paths for part in path.parts}
    # many a key is the stem of a file: config, metrics, identity
    stems = {path.stem for path in paths}
    return [text for text in texts if _is_name(text.text, named if text.is_key else named | stems)]


def _is_name(text: str, named: Collection[str]) -> bool:
    parts = [part for part in text.split("/") if part and not part.isdecimal()]
    return any(part in named or _ID.fullmatch(part) for part in parts)


def replace_text(home: Path, text: StoredText, value: str) -> None:
    """Write a file again with another text in the place of one."""
    path = home / text.file
    if text.cell is not None:
        _replace_cell(path, text, value)
        return
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        lines[0] = json.dumps(_changed(json.loads(lines[0]), text, value))
        path.write_text("\n".join([*lines, ""]))
        return
    parsed = _changed(_parsed(path), text, value)
    dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
    path.write_text(dump(parsed), encoding="utf-8", errors="surrogateescape")


def _texts(home: Path, path: Path) -> Iterator[StoredText]:
    file = path.relative_to(home).as_posix()
    if path.suffix == ".db":
        yield from _texts_of_database(path, file)
    elif path.suffix in (".json", ".yaml", ".jsonl"):
        for steps, is_key, text in _leaves(_parsed(path), ()):
            yield StoredText(file, None, steps, is_key, text)


def _texts_of_database(path: Path, file: str) -> Iterator[StoredText]:
    with closing(sqlite3.connect(path)) as database:
        tables = [
            row[0] for row in database.execute("select name from sqlite_master where type='table'")
        ]
        for table in tables:
            cursor = database.execute(f"select rowid, * from {table}")
            columns = [column[0] for column in cursor.description]
            for row in cursor.fetchall():
                cells = dict(zip(columns, row, strict=True))
                for column, value in cells.items():
                    if isinstance(value, str):
                        text = StoredText(file, (table, column, row[0]), (), False, value)
                        yield from _texts_of_cell(text, str(cells.get("key", "")))


def _texts_of_cell(cell: StoredText, attribute: str) -> Iterator[StoredText]:
    parsed = _json_or_none(cell.text)
    found = [((), False, cell.text)] if parsed is None else _leaves(parsed, ())
    for steps, is_key, text in found:
        yield replace(cell, steps=steps, is_key=is_key, text=text, attribute=attribute)


def _json_or_none(text: str) -> Parsed:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict | list | str) else None


def _parsed(path: Path) -> Parsed:
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    if path.suffix == ".jsonl":
        return json.loads(path.read_text().splitlines()[0])
    return json.loads(path.read_text())


def _leaves(value: Parsed, steps: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], bool, str]]:
    if isinstance(value, str):
        yield steps, False, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*steps, key), True, str(key)
            yield from _leaves(item, (*steps, key))
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from _leaves(item, (*steps, place))


def _changed(parsed: Parsed, text: StoredText, value: str) -> Parsed:
    if not text.steps:
        return value
    *before, last = text.steps
    holder = parsed
    for step in before:
        holder = holder[step]
    if text.is_key:
        holder[value] = holder.pop(last)
    else:
        holder[last] = value
    return parsed


def _replace_cell(path: Path, text: StoredText, value: str) -> None:
    assert text.cell is not None
    table, column, row = text.cell
    with closing(sqlite3.connect(path)) as database, database:
        [(stored,)] = database.execute(f"select {column} from {table} where rowid = ?", (row,))
        parsed = _json_or_none(stored)
        new = value if parsed is None else json.dumps(_changed(parsed, text, value))
        with contextlib.suppress(UnicodeEncodeError):  # a database holds no half of a character
            database.execute(f"update {table} set {column} = ? where rowid = ?", (new, row))
