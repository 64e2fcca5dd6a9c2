"""Read the running Python's standard library: which module is for what, and its docstrings.

Knows one partition of the library's top-level modules: task modules (train, validation, test) and
everything else, which is pre-training text. Does not know how rows are cleaned (`pairs`) or what a
model is. Source is parsed, never imported or executed; torch-free.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRAIN_MODULES: frozenset[str] = _names(
    """
    asyncio collections copyreg csv dis ftplib genericpath linecache logging mailbox
    multiprocessing netrc ntpath numbers operator poplib posixpath pprint pty pydoc shlex
    tarfile tomllib types webbrowser xml zipfile zoneinfo
    """
)
VALIDATION_MODULES: frozenset[str] = _names(
    """
    bdb calendar functools pathlib random selectors trace tracemalloc wsgiref
    """
)
TEST_MODULES: frozenset[str] = _names(
    """
    ast contextlib enum heapq html imaplib locale ssl symtable warnings
    """
)

TASK_MODULES: dict[str, frozenset[str]] = {
    "train": TRAIN_MODULES,
    "validation": VALIDATION_MODULES,
    "test": TEST_MODULES,
}
"""Split -> top-level modules its rows come from.

The split is by module because a random one leaks: neighbouring functions share their wording. The
lists are written down, not drawn, so that a module keeps its split in every Python build; a module
that a build lacks is simply absent. They name public modules that exist from Python 3.10 on and
that distributions do not package apart (as they do with tkinter, idlelib, distutils and lib2to3),
with short docstrings, so that the long prose stays on the pre-training side.
"""

HELD_OUT_MODULES: frozenset[str] = _names(
    """
    gzip ipaddress optparse shutil socketserver uuid
    """
)
"""Pre-training modules kept out of the training stream, to measure the base's loss on."""

_NOT_LIBRARY = frozenset({"__pycache__", "idle_test", "test", "tests"})

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)


@dataclass(frozen=True)
class DocumentedObject:
    """One documented object of the standard library, in source order.

    `signature` is source-like text without a trailing colon; a method carries its class on a line
    of its own, and a module has none (""). `docstring` is as written, indentation cleaned.
    """

    module: str
    signature: str
    docstring: str


def library_modules(root: Path | None = None) -> list[str]:
    """Names of the top-level pure-Python modules under `root` (default: the running Python's)."""
    return sorted({path.stem for path in _root(root).iterdir() if _is_module(path)})


def pretraining_modules(root: Path | None = None) -> list[str]:
    """Names of all modules outside the task, held-out ones included."""
    task = frozenset().union(*TASK_MODULES.values())
    return [module for module in library_modules(root) if module not in task]


def documented(modules: Iterable[str], root: Path | None = None) -> Iterator[DocumentedObject]:
    """Every documented object of `modules`, by module name, file and line; absent modules skip."""
    base = _root(root)
    for module in sorted(modules):
        for file in _files(base, module):
            yield from _documented(module, _parse(file), owner="")


def language_reference() -> list[str]:
    """Plain text of the language reference's topics, as `help()` shows them, by topic name."""
    from pydoc_data.topics import topics  # half a megabyte: only when asked for

    return [topics[name].strip() for name in sorted(topics)]


def _root(root: Path | None) -> Path:
    found = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not (found / "ast.py").is_file():
        raise FileNotFoundError(
            f"the standard library must be installed as source files, none at {str(found)!r}; "
            "use a Python with its .py files (not a zipped or frozen one)"
        )
    return found


def _is_module(path: Path) -> bool:
    name = path.stem if path.suffix == ".py" else path.name
    if not name.isidentifier() or name in _NOT_LIBRARY:
        return False
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def _files(root: Path, module: str) -> list[Path]:
    single = root / f"{module}.py"
    found = ([single] if single.is_file() else []) + sorted((root / module).rglob("*.py"))
    return [file for file in found if not _NOT_LIBRARY & set(file.relative_to(root).parts)]


def _parse(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not ours to report
        return ast.parse(file.read_bytes())


def _documented(
    module: str, node: ast.Module | _Definition, owner: str
) -> Iterator[DocumentedObject]:
    docstring = ast.get_docstring(node)
    if docstring:
        signature = "" if isinstance(node, ast.Module) else _signature(node, owner)
        yield DocumentedObject(module, signature, docstring)
    inner = node.name if isinstance(node, ast.ClassDef) else ""
    for child in _definitions(node):
        yield from _documented(module, child, inner)


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """Definitions directly inside `node`, also those under an `if`, `try` or `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield child
        elif isinstance(child, _BLOCKS):
            yield from _definitions(child)


def _signature(node: _Definition, owner: str) -> str:
    head = _class_head(node) if isinstance(node, ast.ClassDef) else _function_head(node)
    return f"class {owner}:\n    {head}" if owner else head


def _class_head(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in (*node.bases, *node.keywords))
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def _function_head(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"
