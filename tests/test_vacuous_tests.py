"""Every test can fail: none passes because the code under test produced an empty collection."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
WRAPPERS = {"enumerate", "zip", "sorted", "reversed", "list", "tuple", "set", "product", "pairwise"}
"""Calls that yield something if what they are given does; `pairwise` of at least two."""
CONTEXTS = ("pytest.raises", "pytest.warns")

"""Tests that still pass on an empty collection; the list only gets shorter."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_vacuous(test: Function, constants: dict[str, ast.expr]) -> bool:
    """True if a test asserts, but only about each element of a collection that may be empty.

    Args:
        test: the function.
        constants: what its module assigns to each name.
    """
    known = constants | _constants(test)
    checks = list(_checks(test.body, surely=True, constants=known))
    if not checks:  # the calls themselves are the test: nothing is raised
        last = test.body[-1]
        return isinstance(last, ast.For) and may_be_empty(last.iter, known)
    return not any(checks)


def _checks(body: list[ast.stmt], surely: bool, constants: dict[str, ast.expr]) -> Iterator[bool]:
    """Yield for each check in some statements whether it surely runs."""
    for statement in body:
        if isinstance(statement, ast.For | ast.AsyncFor):
            inside = surely and not may_be_empty(statement.iter, constants)
            yield from _checks(statement.body, inside, constants)
            yield from _checks(statement.orelse, surely, constants)
        elif isinstance(statement, ast.Assert):
            yield surely and not _is_about_each(statement.test, constants)
        elif isinstance(statement, ast.With | ast.AsyncWith):
            names = [ast.unparse(item.context_expr) for item in statement.items]
            if any(name.startswith(CONTEXTS) for name in names):
                yield surely
            yield from _checks(statement.body, surely, constants)
        elif isinstance(statement, ast.If | ast.While | ast.Try):
            yield from _checks([*statement.body, *statement.orelse], surely, constants)
        elif isinstance(statement, ast.Expr) and _is_helper(statement.value):
            yield surely


def _is_about_each(condition: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """True for `all(… for … in …)`, and for `not any(…)`, over what may be empty."""
    wanted = "all"
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        condition, wanted = condition.operand, "any"
    if not isinstance(condition, ast.Call) or ast.unparse(condition.func) != wanted:
        return False
    (each,) = condition.args
    if isinstance(each, ast.GeneratorExp | ast.ListComp):
        return may_be_empty(each.generators[0].iter, constants)
    return may_be_empty(each, constants)


def _is_helper(value: ast.expr) -> bool:
    """True for a call of a function whose name says that it asserts."""
    if not isinstance(value, ast.Call):
        return False
    return "assert" in ast.unparse(value.func).rpartition(".")[2]


def may_be_empty(iterable: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """True unless an iterable surely yields something, as far as its module shows."""
    match iterable:
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            return all(
                isinstance(each, ast.Starred) and may_be_empty(each.value, constants)
                for each in elements
            )
        case ast.Dict(keys=keys):
            return not keys
        case ast.Constant(value=value):
            return not value
        case ast.Name(id=name):
            others = {other: value for other, value in constants.items() if other != name}
            return name not in constants or may_be_empty(constants[name], others)
        case ast.Call(func=ast.Name(id="range"), args=[count]):
            return may_be_empty(count, constants)
        case ast.ListComp(generators=[ast.comprehension(iter=inner, ifs=[])]):
            return may_be_empty(inner, constants)
        case ast.Call(func=ast.Name(id="zip"), args=parts, keywords=[_]):  # strict: equally long
            return all(may_be_empty(part, constants) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=parts) if name in WRAPPERS and parts:
            return any(may_be_empty(part, constants) for part in parts)
        case ast.Call(func=ast.Attribute(value=owner, attr="items" | "values" | "keys" | "split")):
            return may_be_empty(owner, constants)
    return True


def _constants(module: ast.Module | Function) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            found |= {ast.unparse(target): statement.value for target in statement.targets}
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            found[ast.unparse(statement.target)] = statement.value
    return found


def vacuous_tests(source: str) -> list[str]:
    """Return the names of a module's tests that pass on an empty collection."""
    module = ast.parse(source)
    constants = _constants(module)
    functions = [node for node in ast.walk(module) if isinstance(node, Function)]
    tests = [function for function in functions if function.name.startswith("test_")]
    return [test.name for test in tests if is_vacuous(test, constants)]


@pytest.mark.parametrize(
    "body",
    [
        "for row in produced(): assert row",
        "assert all(row for row in produced())",
        "assert not any(row for row in produced())",
        "for row in produced():\n        with pytest.raises(ValueError): row()",
        "for size in (1, 2):\n        for row in produced(size): assert row",
        "for a, b in zip(produced(), other(), strict=True): assert a == b",
        "for row in [*produced()]: assert row",
        "for row in EMPTY: assert row",
        "rows = produced()\n    for row in rows: assert row",
        "for row in produced(): refuse(row)",
        "rows = list(rows)\n    for row in rows: assert row",
    ],
)
def test_a_test_that_passes_on_nothing_is_found(body: str) -> None:
    """A loop over what the code produced asserts nothing where nothing is produced."""
    assert vacuous_tests(f"EMPTY = ()\ndef test_it():\n    {body}\n") == ["test_it"]


@pytest.mark.parametrize(
    "body",
    [
        "rows = produced()\n    assert len(rows) == 3\n    for row in rows: assert row",
        "for size in (1, 2): assert produced(size)",
        "for size in SIZES: assert produced(size)",
        "for at, size in enumerate(SIZES): assert produced(size) == at",
        "for name, size in NAMED.items(): assert produced(name) == size",
        "for row, size in zip(produced(), SIZES, strict=True): assert row == size",
        "for _ in range(3): assert produced()",
        "rows = [produced(size) for size in SIZES]\n    for row in rows: assert row",
        "assert all(produced(size) for size in (1, 2))",
        "torch.testing.assert_close(produced(), 1)",
        "produced()",
    ],
)
def test_a_test_that_asserts_something_is_not_named(body: str) -> None:
    """A count, a literal collection or any check outside the loop makes a test able to fail."""
    source = f"SIZES = (1, 2)\nNAMED = {{'a': 1}}\ndef test_it():\n    {body}\n"
    assert vacuous_tests(source) == []


def test_no_test_passes_on_an_empty_collection() -> None:
    """Each test asserts at least once whatever the code under test produces."""
    files = sorted(TESTS.rglob("test_*.py"))
    assert Path(__file__) in files
    found = [
        f"{path.relative_to(TESTS).as_posix()}::{name}"
        for path in files
        for name in vacuous_tests(path.read_text(encoding="utf-8"))
    ]
    assert found == []
