"""Write and read metrics.jsonl: a trial's observations, one line each.

Writing only appends to a local file. sweeper.tracking reads the lines from the file and sends them to
MLflow, so a slow or missing server never delays a trial.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper.core.paths import write_atomic
from sweeper.core.stored_files import read_words, tell_damage


@dataclass
class MetricsSpool:
    """Writer of metrics.jsonl for one attempt of a trial.

    Attributes:
        path: The file. Lines of earlier attempts up to `resumed_at` are kept, later ones removed.
        resumed_at: Optimizer step from which the attempt continues, 0 for a first attempt.
    """

    path: Path
    resumed_at: int

    def __post_init__(self) -> None:
        """Remove the lines of earlier attempts after the step from which this one continues."""
        kept = [row for row in read_spool(self.path) if row["step"] <= self.resumed_at]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line with the finite values of `metrics`.

        Raises:
            OSError: The disk is full. The earlier lines stay intact.
        """
        line = json.dumps({"step": step, "time": time.time(), **finite(metrics)}) + "\n"
        # Unbuffered, so that a killed process loses no observation that it has reported.
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                _write_all(file.fileno(), line.encode())
            except OSError:  # a full disk: remove the part of the line that was written
                file.truncate(before)
                raise


def read_spool(path: Path) -> list[dict[str, Any]]:
    """Return all observations of a trial, oldest first, or an empty list if there is no file.

    A line that a power cut has damaged is left out, and told of once.
    """
    # A last line without a line break is still being written, or was when the process died.
    lines = read_words(path).split("\n")[:-1]
    rows = [_row(line) for line in lines]
    if broken := sum(row is None for row in rows):
        first = rows.index(None) + 1
        words = f"line {first}, and {broken} in all"
        tell_damage(path, ValueError(words), "these observations are lost, all others stay")
    return [row for row in rows if row is not None]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without NaN and infinite values, which JSON and MLflow cannot hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        # a write may take only a part, as on a disk that fills up
        data = data[os.write(descriptor, data) :]


def _row(line: str) -> dict[str, Any] | None:
    """Return an observation, or None if the line is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and "step" in row
    numbers = whole and all(_is_number(value) for value in row.values())
    return row if numbers and row["step"] >= 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
