"""Read docstrings of the running Python's standard library, and assign its modules to splits.

The library's top-level modules are partitioned into task modules (train, validation, test) and
pre-training modules (all others). Does not know how rows are cleaned (`docstring_pairs`) and imports
no torch. Source files are parsed, never imported or executed.
"""

import ast
import hashlib
import sys
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
"""Top-level modules of each split's rows.

The lists name public modules with short docstrings that exist from Python 3.10 on and that Linux
distributions do not package separately (as they do tkinter, idlelib, distutils and lib2to3). A module
that a Python build lacks is skipped.
"""
# The split is by module because a random split leaks: neighbouring functions share their wording. The
# lists are fixed, not drawn, so that a module has the same split in every Python build.

HELD_OUT_MODULES: frozenset[str] = _names(
    """
    gzip ipaddress optparse shutil socketserver uuid
    """
)
"""Pre-training modules that the base was not trained on, to measure its loss and its forgetting."""

_NOT_LIBRARY = frozenset({"__pycache__", "idle_test", "test", "tests"})

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)


@dataclass(frozen=True)
class DocumentedObject:
    """One documented module, class or function of the standard library.

    Attributes:
        module: Name of the top-level module.
        signature: Source-like text without a trailing colon. A method's signature starts with its class
            on a separate line. A module's signature is "".
        docstring: Docstring with cleaned indentation.
    """

    module: str
    signature: str
    docstring: str


def library_modules(root: Path | None = None) -> list[str]:
    """Return the names of the top-level pure-Python modules under `root` (by default, the library)."""
    return sorted({path.stem for path in _root(root).iterdir() if _is_module(path)})


def pretraining_modules(root: Path | None = None) -> list[str]:
    """Return the names of all modules that no split uses, including the held-out ones."""
    task = frozenset().union(*TASK_MODULES.values())
    return [module for module in library_modules(root) if module not in task]


def documented(modules: Iterable[str], root: Path | None = None) -> Iterator[DocumentedObject]:
    """Yield every documented object of the modules, ordered by module, file and line.

    Modules that do not exist are skipped.
    """
    base = _root(root)
    for module in sorted(modules):
        for file in _files(base, module):
            yield from _documented(module, _parse(file), owner="")


def source_digest(
    modules: Iterable[str], code: Iterable[Path] = (), root: Path | None = None
) -> str:
    """Return the sha256 over the modules' files, the Python that reads them, and the code that does.

    Args:
        modules: Names of the modules.
        code: Further files of code, besides this one, that decide what is made of the modules.
        root: Folder of the modules, by default the library's.
    """
    base = _root(root)
    # ast.unparse writes signatures, and differs between versions of Python
    digest = hashlib.sha256(sys.version.encode())
    named = [(file.relative_to(base), file) for m in sorted(modules) for file in _files(base, m)]
    for name, file in [*named, *((Path(path.name), path) for path in (Path(__file__), *code))]:
        digest.update(f"{name.as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def language_reference() -> list[str]:
    """Return the topics of the language reference as `help()` shows them, ordered by name."""
    from pydoc_data.topics import topics  # half a megabyte, so loaded only when needed

    return [topics[name].strip() for name in sorted(topics)]


def _root(root: Path | None) -> Path:
    found = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not (found / "ast.py").is_file():
        raise FileNotFoundError(
            f"the standard library has no source files at {str(found)!r}. "
            "Use a Python installation with its .py files (not a zipped or frozen one)."
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
        warnings.simplefilter("ignore")  # old modules contain invalid escape sequences
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
    """Yield the definitions directly inside a node, including those under `if`, `try` or `with`."""
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
