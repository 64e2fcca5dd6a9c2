"""The kit for GPUs names what exists, although no test runs its parts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KIT = Path(__file__).parents[2] / "benchmarks" / "gpu"
SOURCES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in KIT.glob("*.py")}


@pytest.fixture
def kit() -> ModuleType:
    """The kit's program as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", KIT / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kit_imports_what_exists() -> None:
    """Each name that a part imports from sweeper is there: a rehearsal takes minutes, a GPU is rare."""
    imported = [
        (node.module, alias.name)
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sweeper.")
        for alias in node.names
    ]
    assert len(imported) > 8
    for module, name in imported:
        assert hasattr(importlib.import_module(str(module)), name), f"{module}.{name}"


def test_every_part_has_its_function_and_its_line() -> None:
    """A part of the list is a function of the kit, and README says what it proves."""
    tree, readme = SOURCES["gpu_check.py"], (KIT / "README.md").read_text(encoding="utf-8")
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (parts,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PARTS"
    )
    assert len(parts) > 15
    for name, seconds in parts:
        assert f"part_{name}" in functions
        assert name in readme
        assert seconds > 0


@pytest.mark.parametrize(
    ("name", "entry", "problems"),
    [
        ("smoke", {"nf4": {"cause": "finished"}, "_rc": 0}, []),
        ("smoke", {"nf4": [{"cause": "finished"}, {"cause": "PROBE"}]}, ["nf4[1].cause is PROBE"]),
        ("smoke", {}, ["the part has no result"]),
        ("study", {"study": {"rc": 2}, "_rc": 0}, ["study.rc is 2"]),
        ("resume", {"resume": {"same_bits": False}}, ["resume.same_bits is False"]),
        ("oom", {"infeasible": {"cause": "oom"}, "_rc": 0}, []),
    ],
)
def test_a_part_whose_trials_failed_is_not_proven(
    kit: ModuleType, name: str, entry: dict[str, Any], problems: list[str]
) -> None:
    """The exit code of a part says nothing of its trials; parts that provoke failures may have some."""
    assert kit.unproven(name, entry) == problems
