"""The scorecard of docs/reliability.md: which tests prove each case."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
_ROW = re.compile(r"^\| (?P<case>[RS]\d+)(?P<star>★?) \|(?P<words>.*)\|$")
_TEST = re.compile(r"`(tests/[\w/]+\.py::\w+)`")


@dataclass(frozen=True)
class Case:
    """A row: its name, whether a release needs it, and the tests that prove it."""

    name: str
    must_pass: bool
    tests: tuple[str, ...]


def read_scorecard() -> list[Case]:
    """Every row of the table, in order."""
    rows = map(_ROW.match, PAGE.read_text(encoding="utf-8").splitlines())
    return [
        Case(row["case"], bool(row["star"]), tuple(_TEST.findall(row["words"])))
        for row in rows
        if row is not None
    ]
