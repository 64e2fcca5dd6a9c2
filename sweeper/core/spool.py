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
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.resumed_at]
        write_atomic(self.path, "".join(line + "\n" for line in kept))

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
    """Return all observations of a trial, oldest first, or an empty list if there is no file."""
    if not path.exists():
        return []
    # A last line without a line break is still being written, or was when the process died.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without NaN and infinite values, which JSON and MLflow cannot hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf  # the torn last line of a killed attempt
