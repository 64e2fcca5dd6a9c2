"""Render: rows of a known format into prompt and completion.

A format is recognised by its columns. The instruction template is the one of Stanford Alpaca's short
form; a row without input gets no Input section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeper.data.rows import Row
from sweeper.errors import DataError


@dataclass(frozen=True)
class Example:
    """What the model is given, and what it must answer; only the completion carries loss."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Format:
    """A data format: the columns it is known by, and how a row becomes an example."""

    required: tuple[str, ...]
    render: Callable[[Mapping[str, str]], Example]
    optional: tuple[str, ...] = ()


def _alpaca(row: Mapping[str, str]) -> Example:
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    prompt = f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"
    return Example(prompt, row["output"])


def _prompt_completion(row: Mapping[str, str]) -> Example:
    return Example(row["prompt"], row["completion"])


def _question_answer(row: Mapping[str, str]) -> Example:
    return _alpaca({"instruction": row["question"], "input": "", "output": row["answer"]})


FORMATS: dict[str, Format] = {
    "alpaca": Format(("instruction", "output"), _alpaca, optional=("input",)),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "question_answer": Format(("question", "answer"), _question_answer),
}


def detect_format(row: Row, where: str) -> str:
    """The name of the format whose required columns a row has.

    Raises:
        DataError: no format, listing the columns found and those of every format.
    """
    for name, kind in FORMATS.items():
        if all(column in row for column in kind.required):
            return name
    known = "; ".join(f"{name}: {', '.join(kind.required)}" for name, kind in FORMATS.items())
    raise DataError(f"{where}: no known format has the columns {', '.join(row)} (known: {known})")


def render(rows: Sequence[Row], format_name: str, where: str) -> list[Example]:
    """Every row as an example.

    Raises:
        DataError: a column is missing, no text, or empty where an answer must be.
    """
    kind = FORMATS[format_name]
    return [
        _render(row, kind, f"{where}: row {number}") for number, row in enumerate(rows, start=1)
    ]


def _render(row: Row, kind: Format, where: str) -> Example:
    texts = {column: _text(row, column, where) for column in kind.required}
    texts |= {
        column: _text({column: "", **_present(row)}, column, where) for column in kind.optional
    }
    example = kind.render(texts)
    if not example.completion.strip():
        raise DataError(f"{where}: {kind.required[-1]} is empty, so there is nothing to learn")
    return example


def _present(row: Row) -> dict[str, Any]:
    return {column: value for column, value in row.items() if value is not None}


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"{where}: has no {column}")
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is a {type(value).__name__}, not text")
    return value
