"""docs/architecture.md names rooms, files and classes that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GLOSSARY = PAGE.partition("## Glossary")[2]


def test_every_class_of_the_glossary_exists() -> None:
    """The glossary's third column names classes of the package."""
    rows = [line.split("|")[3] for line in GLOSSARY.splitlines() if line.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    classes = {
        node.name
        for path in (ROOT / "sweeper").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert len(rows) > 25
    assert all("`" in row for row in rows)
    assert sorted(named - classes) == []


def test_every_room_has_its_row() -> None:
    """The table of rooms lists each folder of the package once."""
    table = PAGE.partition("## The rooms")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(rows) == sorted(
        path.parent.name for path in (ROOT / "sweeper").glob("*/__init__.py")
    )


def test_every_named_file_exists() -> None:
    """A path of the page is a file of the package, under the room that the page gives it."""
    rooms = "|".join(path.parent.name for path in (ROOT / "sweeper").glob("*/__init__.py"))
    named = set(re.findall(rf"(?<!/)\b((?:{rooms})/\w+\.py)\b", PAGE))
    assert len(named) > 25
    assert sorted(name for name in named if not (ROOT / "sweeper" / name).is_file()) == []
