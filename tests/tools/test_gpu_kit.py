"""The kit for GPUs names what exists, although no test runs its parts."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

KIT = Path(__file__).parents[2] / "benchmarks" / "gpu"
SOURCES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in KIT.glob("*.py")}


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
