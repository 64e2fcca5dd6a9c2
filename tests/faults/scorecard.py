"""The scorecard of docs/reliability.md: which tests prove each case, and what the last run found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sweeper.core.paths import write_atomic

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


def write_results(results: Mapping[str, str]) -> None:
    """Put what was found into the last column of each case's row."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    write_atomic(PAGE, "".join(_with_result(line, results) + "\n" for line in lines))


def _with_result(line: str, results: Mapping[str, str]) -> str:
    row = _ROW.match(line)
    if row is None or row["case"] not in results:
        return line
    return f"{line.removesuffix('|').rpartition('|')[0]}| {results[row['case']]} |"
