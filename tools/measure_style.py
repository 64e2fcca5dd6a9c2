"""Measure names, docstrings and comments of sweeper/ against the limits below.

    python tools/measure_style.py [PATH ...]        # PATH: files or folders; sweeper/ without

Prints one line a figure and exits with 1 if a limit is exceeded. tests/tools/test_measure_style.py
holds the package to the limits.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPENING = re.compile(
    r"(What|Whether|Of|Who|Whose|Where|How|Why|Which|As|By|In|On|At|From|To|With|Without|Until|"
    r"Once|Before|After|If|For|When)\b"
)
ARCHAIC = re.compile(
    r"\b(nobody|whoever|anew|beside|goes on|(?:is|are|was|were) told|held against|thereof)\b",
    re.IGNORECASE,
)
LIMITS = {
    "public names defined more than once": 0.0,
    "module names used more than once": 0.0,
    "docstring openings, %": 4.0,
    "semicolons per 1,000 words of docstring": 1.0,
    "archaic turns per 1,000 words of docstring": 0.3,
    "one-word class names, %": 25.0,
}


@dataclass(frozen=True)
class Docstring:
    """A docstring and where it stands."""

    where: str
    text: str


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    path: Path
    text: str

    @property
    def tree(self) -> ast.Module:
        """The syntax tree of the file."""
        return ast.parse(self.text)

    def docstrings(self) -> Iterator[Docstring]:
        """Yield the docstrings of the module, its classes and functions, and of attributes."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield Docstring(f"{self.path}:{getattr(node, 'lineno', 1)}", text)
            if isinstance(node, ast.Module | ast.ClassDef):
                yield from self._attributes(node)

    def _attributes(self, node: ast.Module | ast.ClassDef) -> Iterator[Docstring]:
        for before, after in zip(node.body, node.body[1:], strict=False):
            if not isinstance(before, ast.Assign | ast.AnnAssign):
                continue
            value = after.value if isinstance(after, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield Docstring(f"{self.path}:{after.lineno}", value.value)

    def classes(self) -> list[str]:
        """Return the names of the public classes."""
        nodes = (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))
        return [node.name for node in nodes if not node.name.startswith("_")]

    def comment_lines(self) -> int:
        """Count the lines that carry a comment, tool directives left out."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        comments = (token.string for token in tokens if token.type == tokenize.COMMENT)
        return sum(not re.match(r"# ?(noqa|type:|fmt:)", comment) for comment in comments)

    def single_use_functions(self) -> list[str]:
        """Return private functions that the file names once besides their definition."""
        uses = Counter(
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name | ast.Attribute)
        )
        functions = (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef))
        return [
            node.name
            for node in functions
            if node.name.startswith("_") and not node.name.startswith("__") and uses[node.name] == 1
        ]


def read_modules(paths: Sequence[Path]) -> list[Module]:
    """Return the Python files at or below `paths`, in order."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    return [Module(file, file.read_text(encoding="utf-8")) for file in sorted(files)]


def twice(names: Sequence[str]) -> list[str]:
    """Return the names that occur more than once."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def one_word(name: str) -> bool:
    """Return True if a class name is one capitalised word."""
    return len(re.findall(r"[A-Z][a-z0-9]*", name)) == 1


def measure(modules: Sequence[Module], details: list[str]) -> dict[str, float]:
    """Return every figure by its name; append the places behind it to `details`."""
    docstrings = [docstring for module in modules for docstring in module.docstrings()]
    words = sum(len(docstring.text.split()) for docstring in docstrings) or 1
    classes = [name for module in modules for name in module.classes()]
    stems = [module.path.stem for module in modules if module.path.stem != "__init__"]
    openings = [each for each in docstrings if OPENING.match(each.text)]
    semicolons = [each for each in docstrings if ";" in each.text]
    archaic = [(each, ARCHAIC.findall(each.text)) for each in docstrings]
    lines = sum(len(module.text.splitlines()) for module in modules) or 1
    single = [name for module in modules for name in module.single_use_functions()]
    details += [f"opening    {each.where}: {each.text.splitlines()[0]}" for each in openings]
    details += [f"semicolon  {each.where}: {each.text.splitlines()[0]}" for each in semicolons]
    details += [f"archaic    {each.where}: {', '.join(found)}" for each, found in archaic if found]
    details += [f"twice      {name}" for name in twice(classes) + twice(stems)]
    return {
        "public names defined more than once": len(twice(classes)),
        "module names used more than once": len(twice(stems)),
        "docstring openings, %": 100 * len(openings) / max(1, len(docstrings)),
        "semicolons per 1,000 words of docstring": 1000
        * sum(each.text.count(";") for each in docstrings)
        / words,
        "archaic turns per 1,000 words of docstring": 1000
        * sum(len(found) for _, found in archaic)
        / words,
        "one-word class names, %": 100 * sum(map(one_word, classes)) / max(1, len(classes)),
        "comment lines, %": 100 * sum(module.comment_lines() for module in modules) / lines,
        "private functions used once": len(single),
        "lines": lines,
        "public classes": len(classes),
    }


def main() -> None:
    """Print the figures, the details with -v, and exit with 1 above a limit."""
    arguments = [Path(each) for each in sys.argv[1:] if each != "-v"] or [ROOT / "sweeper"]
    details: list[str] = []
    figures = measure(read_modules(arguments), details)
    if "-v" in sys.argv:
        print("\n".join(details))
    for name, value in figures.items():
        limit = f"   (limit {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{value:10,.1f}  {name}{limit}")
    sys.exit(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
