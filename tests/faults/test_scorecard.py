"""docs/reliability.md: every case is there, and every test that it names exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.scorecard import ROOT, read_scorecard

MUST_PASS = {
    *("R1", "R2", "R4", "R7", "R8", "R12", "R13", "R14", "R16", "R20", "R26", "R27"),
    *("S1", "S2", "S5", "S7", "S15"),
}
CASES = {case.name: case for case in read_scorecard()}


def test_every_case_has_a_row() -> None:
    """R1 to R27 and S1 to S16, the ones that a release needs with a star."""
    assert set(CASES) == {*(f"R{n}" for n in range(1, 28)), *(f"S{n}" for n in range(1, 17))}
    assert {case.name for case in CASES.values() if case.must_pass} == MUST_PASS


@pytest.mark.parametrize("name", CASES)
def test_every_named_test_exists(name: str) -> None:
    """A case is proven by one test or more; R24 by the soak."""
    tests = CASES[name].tests
    assert tests or name == "R24"
    missing = [test for test in tests if not _exists(test)]
    assert missing == []


def _exists(test: str) -> bool:
    path, _, name = test.partition("::")
    return (ROOT / path).exists() and name in _functions(ROOT / path)


def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
