"""metrics.jsonl: what a trial measured, one line per observation; written and read here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper.folders import write_atomic


@dataclass
class Spool:
    """One line per observation, appended at once, never over a network."""

    path: Path
    resumed_at: int

    def __post_init__(self) -> None:
        """A new attempt keeps what the earlier one wrote up to the step it continues from."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.resumed_at]
        write_atomic(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the finite ones of `metrics`."""
        line = json.dumps({"step": step, "time": time.time(), **finite(metrics)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_spool(path: Path) -> list[dict[str, Any]]:
    """All observations of a trial, oldest first; none if it never got to one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON and MLflow know no NaN and no infinity."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf  # the torn last line of a killed attempt
