"""Data settings and small data files for these tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sweeper.config.settings import DataSettings
from sweeper.data.examples import ChatMessage, Example, RawRow
from tests.conftest import make_settings


@cache
def _defaults() -> dict[str, Any]:
    return make_settings().data.model_dump()


def make_data(**values: Any) -> DataSettings:
    """The default data settings with some values replaced; `cleaning` is merged."""
    cleaning = {**_defaults()["cleaning"], **values.pop("cleaning", {})}
    return DataSettings.model_validate({**_defaults(), **values, "cleaning": cleaning})


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines; the path as settings have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(numbers: Iterable[int], **more: Any) -> list[dict[str, Any]]:
    """Prompt and completion for each number, with the same further columns."""
    return [{"prompt": f"What is {n}?", "completion": f"It is {n}.", **more} for n in numbers]


def example(prompt: str, completion: str, **values: Any) -> Example:
    """One question and its answer."""
    turns = (ChatMessage("user", prompt), ChatMessage("assistant", completion))
    return Example(turns, RawRow(values, "here:1"))


def text_example(text: str, where: str = "book.txt") -> Example:
    """A plain text as an example."""
    return Example((ChatMessage("assistant", text),), RawRow({"text": text}, where), "book")
