"""Make chat rows (signature -> first sentence of the docstring) and general text from pinned packages.

    make real-model
    python -m tools.docstring_data --out FOLDER

Knows which packages belong to which split, which functions are public, and the rules of cleaning, which
are the product's own. Does not know models or tokens. The code of the packages is parsed, never
installed or executed. Needs a network once.

The same packages give the same bytes: rows are ordered and drawn by the digest of their text.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from sweeper.builtin.docstring_pairs import INSTRUCTION, first_sentence, row_defect
from sweeper.config.data_settings import CleaningSettings
from sweeper.core.errors import DataError
from sweeper.data import cleaning
from sweeper.data.duplicates import SeenTexts
from sweeper.data.examples import DropCounts, Example, RawRow
from sweeper.data.row_formats import to_examples
from tools.guarded_build import CARD, built_folder, errors_as_sentences, require_space
from tools.pinned_wheel import PinnedWheel, fetch, members, sha256

REBUILD_COMMAND = "python -m tools.docstring_data"
PROVENANCE = "provenance.json"
GENERAL_TEXT = "general.txt"
"""Prose that is not about the task, to measure what a model forgets."""
SPACE_BYTES = 60_000_000
"""Free bytes that a build needs: wheels of 23 MB, and 1 MB of rows."""


PACKAGES = Path(__file__).with_name("docstring_packages.csv")
"""Table of the pinned wheels: split, licence of the texts, file name, digest."""

# The split is by package because neighbouring functions share their wording. The packages of a split are
# of several fields, so that no split is about one of them.
ROWS_PER_PACKAGE: Mapping[str, int] = {"test": 50, "gate": 50, "validation": 50, "train": 350}
"""Largest number of rows that a package may give, by split, in the order of cleaning: of two rows alike,
the one of the earlier split is kept."""

CLEANING = CleaningSettings(
    deduplicate="near",
    near_threshold=0.8,
    min_completion_chars=10,
    max_chars=None,
    low_quality=True,
    completion_pattern=r"^[A-Z].*[.!?]$",  # a whole sentence: packages differ in what else they write
    completion_json=False,
    redact=[],
)

MIN_PROSE_WORDS = 12
"""Words from which a paragraph counts as prose. A judgement: headings and badges have fewer."""

_NOT_PUBLIC = frozenset({"test", "tests", "testing", "conftest", "externals", "vendor", "examples"})
"""Folders and modules of a wheel whose functions are not for its users."""


@dataclass(frozen=True)
class DataReport:
    """Facts about one build, as its provenance.json keeps them.

    Attributes:
        rows: Number of rows by split and package.
        dropped: Number of rows that were left out, by reason.
        sha256: Digest of each file of rows, by its name.
        seconds: Seconds of the build, downloads included.
    """

    rows: dict[str, dict[str, int]]
    dropped: dict[str, int]
    sha256: dict[str, str]
    seconds: float


def pinned_wheels(table: Path = PACKAGES) -> dict[str, list[PinnedWheel]]:
    """Return the wheels of each split, in the order of cleaning."""
    with table.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return {
        split: [
            PinnedWheel(line["wheel"], line["sha256"], line["licence"])
            for line in lines
            if line["split"] == split
        ]
        for split in ROWS_PER_PACKAGE
    }


def build_data(
    out: Path, wheels: Path, pinned: Mapping[str, Sequence[PinnedWheel]] | None = None
) -> DataReport:
    """Write one JSON Lines file for each split to `out`, the general text, a card and the provenance.

    Args:
        out: Folder to write. An earlier build is replaced once the new one is complete.
        wheels: Folder that keeps the downloaded packages.
        pinned: Wheels by split, in the order of cleaning. None: those of PACKAGES.

    Raises:
        SweeperError: A package cannot be fetched or is another, the disk is too small, `out` holds
            something else, or a split has no row.
    """
    started = time.perf_counter()
    packages = pinned_wheels() if pinned is None else pinned
    with built_folder(out, "a folder of docstring rows", REBUILD_COMMAND) as fresh:
        require_space(out, SPACE_BYTES)
        drops = DropCounts()
        raw = {
            split: {wheel.package: _rows(wheel, wheels, drops) for wheel in found}
            for split, found in packages.items()
        }
        kept = clean_rows(raw, drops)
        for name, rows in kept.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (fresh / f"{name}.jsonl").write_text(text, encoding="utf-8")
        paths = [fetch(wheel, wheels) for found in packages.values() for wheel in found]
        (fresh / GENERAL_TEXT).write_text(general_text(paths), encoding="utf-8")
        report = DataReport(
            rows={name: dict(Counter(row["package"] for row in kept[name])) for name in kept},
            dropped=drops.total,
            sha256={file.name: sha256(file) for file in sorted(fresh.iterdir())},
            seconds=time.perf_counter() - started,
        )
        provenance = {"packages": _listed(packages, report), **vars(report)}
        (fresh / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        (fresh / CARD).write_text(_data_card(report, packages), encoding="utf-8")
    return report


def clean_rows(
    raw: Mapping[str, Mapping[str, Sequence[RawRow]]], drops: DropCounts
) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of each split that the product's cleaning keeps, at most ROWS_PER_PACKAGE each.

    Args:
        raw: Rows by split and package. The earlier of two splits keeps a row that both have.
        drops: Counter of the rows that are left out.

    Raises:
        DataError: A split has no row.
    """
    seen = SeenTexts(CLEANING.near_threshold)
    result: dict[str, list[Mapping[str, Any]]] = {}
    for split, packages in raw.items():
        kept: list[Example] = []
        for rows in packages.values():
            examples = to_examples(rows, "messages", {}, drops)
            clean = sorted(cleaning.clean(examples, CLEANING, seen, drops), key=_order)
            limit = ROWS_PER_PACKAGE[split]
            kept += clean[:limit]
            for example in clean[limit:]:
                drops.drop("draw", "more than a package may give", example.row.where)
        if not kept:
            raise DataError(
                f"no public function of {', '.join(packages)} gives a row for {split}. "
                f"Left out: {_listing(drops.total)}."
            )
        result[split] = [example.row.values for example in sorted(kept, key=_order)]
    return result


def general_text(wheels: Sequence[Path]) -> str:
    """Return the prose of the packages' descriptions: whole sentences, without links and code."""
    paragraphs = []
    for wheel in wheels:
        for _, metadata in members(wheel, ".dist-info/METADATA"):
            # The description follows the first empty line, as the body of an e-mail does
            description = metadata.decode("utf-8").partition("\n\n")[2]
            parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", description))
            paragraphs += [part for part in parts if _is_prose(part)]
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"


def public_functions(source: bytes) -> Iterator[tuple[str, str]]:
    """Yield the signature and the docstring of each documented public function of a module.

    The signature of a method begins with its class on a line of its own. What is defined inside of
    functions is left out.

    Raises:
        SyntaxError: The source is of another version of Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escape sequences
        yield from _functions(ast.parse(source), owner="")


def _functions(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield from _functions(child, name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not child.name.startswith("_"):
                if docstring := ast.get_docstring(child):
                    yield _signature(child, owner), docstring
            case ast.If() | ast.Try() | ast.With():
                yield from _functions(child, owner)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    head = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"
    return f"class {owner}:\n    {head}" if owner else head


def _rows(wheel: PinnedWheel, folder: Path, drops: DropCounts) -> list[RawRow]:
    """Return the chat rows of a wheel's public functions, before any cleaning of texts."""
    rows = []
    for name, source in members(fetch(wheel, folder), ".py"):
        if not _is_public(name):
            continue
        try:
            functions = list(public_functions(source))
        except SyntaxError:  # templates, and modules for another version of Python
            drops.drop("read", "not parsed by this Python", name)
            continue
        for signature, docstring in functions:
            answer = first_sentence(docstring)
            if reason := row_defect({"input": signature, "output": answer}):
                drops.drop("docstring", reason, name)
            else:
                rows.append(RawRow(_row(wheel.package, signature, answer), name))
    return rows


def _row(package: str, signature: str, answer: str) -> dict[str, Any]:
    question = f"{INSTRUCTION}\n\n{signature}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "package": package}


def _is_public(name: str) -> bool:
    parts = PurePosixPath(name).with_suffix("").parts
    inside = parts[1:-1] if parts[-1] == "__init__" else parts[1:]
    return not any(part.startswith(("_", "test_")) or part in _NOT_PUBLIC for part in inside)


def _is_prose(paragraph: str) -> bool:
    if len(paragraph.split()) < MIN_PROSE_WORDS or "://" in paragraph:
        return False
    return paragraph[0].isalpha() and paragraph[-1] in ".!?:"


def _order(example: Example) -> str:
    """Return a number without meaning that is a row's own, as the key of a fixed shuffle."""
    return hashlib.sha256(example.text.encode()).hexdigest()


def _listed(
    packages: Mapping[str, Sequence[PinnedWheel]], report: DataReport
) -> list[dict[str, Any]]:
    """Return one entry for each package: split, licence, digest, and the number of its rows."""
    return [
        {
            "split": split,
            "package": wheel.requirement,
            "licence": wheel.licence,
            "rows": report.rows[split].get(wheel.package, 0),
            "sha256": wheel.sha256,
        }
        for split, wheels in packages.items()
        for wheel in wheels
    ]


def _listing(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "nothing"


def _data_card(report: DataReport, packages: Mapping[str, Sequence[PinnedWheel]]) -> str:
    """Return README.md of the folder: what the rows are, their packages, licences and digests."""
    lines = "\n".join(
        f"| {item['split']} | {item['package']} | {item['licence']} | {item['rows']} |"
        for item in _listed(packages, report)
    )
    files = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in report.sha256.items())
    return f"""\
# Docstring rows

Signature of a public function and the first sentence of its docstring, as chat. The texts are those of
the packages, under their licences. No package is in two splits. {GENERAL_TEXT} holds the prose of the
packages' descriptions, to measure forgetting.

| split | package | licence | rows |
|-|-|-|-:|
{lines}

| file | sha256 |
|-|-|
{files}

Left out: {_listing(report.dropped)}.

Rebuild: `{REBUILD_COMMAND} --out FOLDER`, in a checkout of sweeper.
The digests of the packages are in {PROVENANCE}.
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the rows to.")] = Path(
        "real_model/docstrings"
    ),
    wheels: Annotated[Path, typer.Option(help="Folder that keeps the downloaded packages.")] = Path(
        "real_model/wheels"
    ),
) -> None:
    """Fetch the packages and write train, validation, test and gate rows (half a minute)."""
    with errors_as_sentences():
        report = build_data(out, wheels)
    for name, packages in report.rows.items():
        print(f"{out / name}.jsonl: {sum(packages.values()):,} rows of {len(packages)} packages")
    for name, digest in report.sha256.items():
        print(f"{name}: sha256 {digest}")
    print(f"made in {report.seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
