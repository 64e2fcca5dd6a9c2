"""Read and write a bank of curves: gzipped JSON lines, the header first and then the trainings.

    header, trials = read_bank("embedded")

Knows neither studies nor policies. README.md describes each key.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def read_bank(name: str, folder: Path = HERE) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header of a bank and its trainings, in the order in which they were planned."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        header, *trials = map(json.loads, file)
    return header, trials


def write_bank(
    name: str,
    header: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    folder: Path = HERE,
) -> Path:
    """Write a bank and return its file. The same trainings give the same bytes.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    path = folder / f"{name}.jsonl.gz"
    lines = (json.dumps(line, separators=(",", ":"), allow_nan=False) for line in (header, *trials))
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def has_bank(name: str, folder: Path = HERE) -> bool:
    """Return True if a bank has been exported."""
    return (folder / f"{name}.jsonl.gz").exists()


def config_of(header: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that trains one of the bank's trainings again."""
    config = copy.deepcopy(header["config"])
    for key, value in trial["point"].items():
        section, _, name = key.partition(".")
        config[section][name] = value
    return {**config, "seed": trial["seed"]}
