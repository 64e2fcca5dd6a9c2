"""metrics.jsonl: what a trial measured, one line per observation; written and read here.

Writing appends to a local file and does nothing else: whoever ships the lines to a server
(sweeper.tracking) reads them from here, whenever it can.
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
    """One line per observation, appended at once, never over a network."""

    path: Path
    resumed_at: int

    def __post_init__(self) -> None:
        """A new attempt keeps what the earlier one wrote up to the step it continues from."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.resumed_at]
        write_atomic(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the finite ones of `metrics`.

        Raises:
            OSError: the disk is full; what was there before is whole.
        """
        line = json.dumps({"step": step, "time": time.time(), **finite(metrics)}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                _write_all(file.fileno(), line.encode())
            except OSError:
                file.truncate(before)
                raise


def read_spool(path: Path) -> list[dict[str, Any]]:
    """All observations of a trial, oldest first; none if it never got to one.

    The line that is being written at this moment, or was when the process died, is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON and MLflow know no NaN and no infinity."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf  # the torn last line of a killed attempt
