"""Split: where train, validation and test come from, what they hold, and a digest of it all.

Knows no tokenizer. Files without a validation split are split by row with `split_seed`; the embedded
pairs bring their own splits, by module.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sweeper.data.formats import Example, detect_format, render
from sweeper.data.rows import Row, path_problem, read_rows
from sweeper.embedded.pairs import docstring_pairs
from sweeper.errors import DataError
from sweeper.settings import EMBEDDED, Data


@dataclass(frozen=True)
class Splits:
    """Examples by split (train, validation, test), and what there is to say about them."""

    examples: dict[str, list[Example]]
    format: str
    source: str
    dropped: dict[str, int]

    @property
    def counts(self) -> dict[str, int]:
        """Examples by split."""
        return {name: len(rows) for name, rows in self.examples.items()}

    @property
    def digest(self) -> str:
        """sha256 over the rendered examples of all splits, in order."""
        lines = (
            json.dumps([name, example.prompt, example.completion], ensure_ascii=False)
            for name, examples in sorted(self.examples.items())
            for example in examples
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_splits(settings: Data) -> Splits:
    """The examples of a data configuration.

    Raises:
        DataError: a file is missing or broken, or a split would be empty.
    """
    splits = _embedded(settings) if settings.train == EMBEDDED else _files(settings)
    if settings.max_samples is not None:
        train = _sample(splits.examples["train"], settings.max_samples, settings.split_seed)
        splits.examples["train"] = train
    for name in ("train", "validation"):
        if not splits.examples[name]:
            raise DataError(
                f"{splits.source}: the {name} split is empty; give more rows or a file of its own "
                f"(data.{name}=FILE)"
            )
    return splits


def path_problems(settings: Data) -> list[str]:
    """What is wrong with the paths of a data configuration, by key."""
    if settings.train == EMBEDDED:
        return []
    found = {key: path_problem(path) for key, path in _paths(settings).items()}
    return [f"data.{key}={problem}" for key, problem in found.items() if problem]


def _paths(settings: Data) -> dict[str, Path]:
    paths = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    return {name: Path(path).expanduser() for name, path in paths.items() if path is not None}


def _embedded(settings: Data) -> Splits:
    for name in ("validation", "test"):
        if getattr(settings, name) is not None:
            raise DataError(
                f"data.{name} needs data.train=FILE; the embedded pairs bring their own"
            )
    pairs = docstring_pairs()
    source = f"docstring pairs of {platform.python_implementation()} {platform.python_version()}"
    examples = {name: render(rows, "alpaca", source) for name, rows in pairs.rows.items()}
    return Splits(examples, "alpaca", source, dict(pairs.dropped))


def _files(settings: Data) -> Splits:
    given = _paths(settings)
    rows = {name: read_rows(path) for name, path in given.items()}
    where = str(given["train"])
    found: str = settings.format
    if found == "auto":
        found = detect_format(rows["train"][0], where)
    unique = list({json.dumps(row, sort_keys=True): row for row in rows["train"]}.values())
    dropped = {"duplicate": len(rows["train"]) - len(unique)}  # they would leak across the split
    rows = _split_off({**rows, "train": unique}, settings)
    examples = {name: render(rows[name], found, str(given.get(name, where))) for name in rows}
    return Splits(examples, found, where, dropped)


def _split_off(rows: Mapping[str, list[Row]], settings: Data) -> dict[str, list[Row]]:
    """Take validation and test rows off train where no file brings them."""
    train = list(rows["train"])
    random.Random(settings.split_seed).shuffle(train)
    result = dict(rows)
    ratios = {"validation": settings.validation_ratio, "test": settings.test_ratio}
    total = len(train)
    for name, ratio in ratios.items():
        if name not in rows:
            count = max(round(total * ratio), name == "validation")
            result[name], train = train[:count], train[count:]
    return {**result, "train": train}


def _sample(examples: list[Example], count: int, seed: int) -> list[Example]:
    chosen = random.Random(seed).sample(range(len(examples)), min(count, len(examples)))
    return [examples[index] for index in sorted(chosen)]
