"""Build stand-in data sets: layouts of well-known data sets, filled with the library's docstrings.

Imports no torch, because the driver resolves their paths before any worker starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from sweeper.builtin.docstring_pairs import docstring_pairs
from sweeper.builtin.stand_ins import PREFIX, stand_in_folder
from sweeper.builtin.stdlib_text import language_reference
from sweeper.core.errors import DataError

Pair = dict[str, str]


def data_path(name: str) -> Path:
    """Return the file or folder of a stand-in data set, and build the data set if it is missing.

    Args:
        name: Name with prefix: `stand_in:finetome`, `stand_in:instruct/val.jsonl`.

    Raises:
        DataError: There is no such stand-in or file. The message lists the known stand-ins.
    """
    if problem := unknown_stand_in(name):
        raise DataError(problem)
    data_set, _, inside = name.removeprefix(PREFIX).partition("/")
    path = stand_in_folder("data", data_set, DATA[data_set]) / inside
    if not path.exists():
        raise DataError(f"{name}: this stand-in has no file {inside}")
    return path


def unknown_stand_in(name: str) -> str | None:
    """Return why a stand-in's name is invalid, or None. Nothing is built."""
    if name.removeprefix(PREFIX).partition("/")[0] in DATA:
        return None
    return f"{name}: no such stand-in. Stand-ins for data are {', '.join(sorted(DATA))}."


def _alpaca(folder: Path) -> None:
    """Build tatsu-lab/alpaca: Parquet with instruction, input, output and the rendered text."""
    rows = [{**pair, "text": _rendered(pair)} for pair in pairs()]
    _hub_layout(folder, rows, "The columns of tatsu-lab/alpaca.")


def _finetome(folder: Path) -> None:
    """Build mlabonne/FineTome-100k: Parquet with conversations (from, value), source and score."""
    rows = []
    # not strict: of an odd number of rows the last one is left out
    for number, (first, second) in enumerate(zip(pairs()[::2], pairs()[1::2], strict=False)):
        # Some conversations have two answers, and some a system turn, as in the real data set.
        turns = _turns(first) + (_turns(second) if number % 3 == 0 else [])
        system = [{"from": "system", "value": "You document Python code."}]
        conversation = (system if number % 4 == 0 else []) + turns
        rows.append({"conversations": conversation, "source": "stand_in", "score": 3.0})
    _hub_layout(folder, rows, "The columns of mlabonne/FineTome-100k.")


def _instruct(folder: Path) -> None:
    """Build two JSON Lines files, train and val, with instruction, input and output."""
    held_out = len(pairs()) // 10
    _json_lines(folder / "train.jsonl", pairs()[held_out:])
    _json_lines(folder / "val.jsonl", pairs()[:held_out])


def _book(folder: Path) -> None:
    """Build one plain-text file with the topics of Python's language reference."""
    (folder / "book.txt").write_text("\n\n".join(language_reference()), encoding="utf-8")


DATA: dict[str, Callable[[Path], None]] = {
    "alpaca": _alpaca,
    "finetome": _finetome,
    "instruct": _instruct,
    "book": _book,
}


@cache
def pairs() -> tuple[Pair, ...]:
    """Return the rows (instruction, input, output) from which every stand-in is made."""
    return tuple(docstring_pairs().rows["train"])


def _turns(pair: Pair) -> list[dict[str, str]]:
    question = f"{pair['instruction']}\n\n{pair['input']}"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": pair["output"]}]


def _rendered(pair: Pair) -> str:
    return (
        f"### Instruction:\n{pair['instruction']}\n\n### Input:\n{pair['input']}\n\n"
        f"### Response:\n{pair['output']}"
    )


def _json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _hub_layout(folder: Path, rows: list[dict[str, Any]], description: str) -> None:
    """Write rows as a clone of a hub data set: a README.md with YAML head, and Parquet under data/."""
    (folder / "data").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    card = f"""---
license: psf-2.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---

{description} Made of docstrings of the Python standard library.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
