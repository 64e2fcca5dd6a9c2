"""Format: rows of known columns into examples, whatever file they came from.

A format is recognised by its columns. Knows nothing of templates and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sweeper.data.examples import Example, Ledger, Message, Row
from sweeper.errors import DataError

STAGE = "format"


class Unusable(Exception):
    """Why one row is no example: the ledger's reason."""


@dataclass(frozen=True)
class Format:
    """A data format: the columns it is known by, and how a row's values become messages."""

    required: tuple[str, ...]
    messages: Callable[[Mapping[str, object]], tuple[Message, ...]]


def _text(values: Mapping[str, object], column: str, *, optional: bool = False) -> str:
    value = values.get(column)
    if value is None and optional:
        return ""
    if value is None:
        raise Unusable(f"no {column}")
    if not isinstance(value, str):
        raise Unusable(f"{column} is a {type(value).__name__}, not text")
    return value


def _answer(values: Mapping[str, object], column: str) -> Message:
    text = _text(values, column)
    if not text.strip():
        raise Unusable(f"{column} is empty")
    return Message("assistant", text)


def _alpaca(values: Mapping[str, object]) -> tuple[Message, ...]:
    given = _text(values, "input", optional=True)
    return (Message("user", _text(values, "instruction"), given), _answer(values, "output"))


def _prompt_completion(values: Mapping[str, object]) -> tuple[Message, ...]:
    return (Message("user", _text(values, "prompt")), _answer(values, "completion"))


def _question_answer(values: Mapping[str, object]) -> tuple[Message, ...]:
    return (Message("user", _text(values, "question")), _answer(values, "answer"))


FORMATS: dict[str, Format] = {
    "alpaca": Format(("instruction", "output"), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "question_answer": Format(("question", "answer"), _question_answer),
}


def detect_format(row: Row, columns: Mapping[str, str]) -> str:
    """The name of the format whose required columns a row has (`columns`: format's name -> file's name).

    Raises:
        DataError: no format, listing the columns found and those of every format.
    """
    for name, kind in FORMATS.items():
        if all(columns.get(column, column) in row.values for column in kind.required):
            return name
    known = "; ".join(f"{name}: {', '.join(kind.required)}" for name, kind in FORMATS.items())
    raise DataError(
        f"{row.where}: no known format has the columns {', '.join(row.values)} (known: {known}); "
        "map yours with data.columns"
    )


def to_examples(
    rows: Sequence[Row], format_name: str, columns: Mapping[str, str], ledger: Ledger
) -> list[Example]:
    """Every usable row as an example; the others go into the ledger with the reason.

    Args:
        rows: as they were read.
        format_name: a key of FORMATS.
        columns: the format's column -> the column of the rows, where they differ.
        ledger: where unusable rows are counted.
    """
    kind = FORMATS[format_name]
    examples = []
    for row in rows:
        renamed = {
            **row.values,
            **{ours: row.values.get(theirs) for ours, theirs in columns.items()},
        }
        try:
            examples.append(Example(kind.messages(renamed), row))
        except Unusable as reason:
            ledger.drop(STAGE, str(reason), row.where)
    return examples
