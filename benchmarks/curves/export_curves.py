"""Export the trainings of make_curves.py as the small files of the bank.

    python -m benchmarks.curves.export_curves              # every part that has trainings
    python -m benchmarks.curves.export_curves embedded

A part may be exported before it is complete. The trainings of one file share data, base model and every
setting besides the point and the seed. Reads the studies' folders only.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.curves.bank_points import RANK, RATE, RATIO, TARGETS, WARMUP, is_factorial
from benchmarks.curves.curve_bank import HERE, write_bank
from benchmarks.curves.make_curves import OUTPUTS, REPEATED, SEEDS, cpu_seconds, ended_folders
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.spool import read_spool
from sweeper.evaluation.judge import draw_rows
from sweeper.training.look_losses import StoredLook, read_looks

LORA_KEYS = (RATE, RANK, RATIO, TARGETS, WARMUP)
FULL_KEYS = (RATE,)
LOOK_ROWS = 96
"""Rows of a trial's look by default (conf/evaluation/tiny.yaml): the bank says which they are."""
ROWS_AT = (0.25, 0.5, 1.0)
"""Fractions of the schedule at which the loss of each row is kept."""
PROVENANCE = ("git.commit", "git.dirty", "python", "machine", "cpu", "device")
INPUTS = ("data", "base", "config", "judged", "trained")


@dataclass(frozen=True)
class BankFile:
    """One file of the bank, and the arms of studies that it is made of."""

    name: str
    sources: tuple[tuple[str, str], ...]
    """Names of the studies and of their arms."""
    keys: tuple[str, ...]
    """Searched settings, which make up a point."""
    chosen_after: bool = False
    """True if the points were chosen by values of another file, which therefore flatter them."""


FILES = (
    BankFile("embedded", (("curves_embedded", "lora"),), LORA_KEYS),
    BankFile("full", (("curves_embedded", "full"),), FULL_KEYS),
    BankFile("base", (("curves_base", "lora"),), LORA_KEYS),
    BankFile("chat", (("curves_chat", "lora"),), LORA_KEYS),
    *(
        BankFile(
            f"{bank}_seeds",
            tuple((f"curves_{bank}_seed_{seed}", "lora") for seed in SEEDS),
            LORA_KEYS,
            chosen_after=True,
        )
        for bank in REPEATED
    ),
)


@dataclass(frozen=True)
class ReadTraining:
    """One training, and the properties that it must share with all others of its file."""

    line: dict[str, Any]
    shared: dict[str, Any]
    provenance: dict[str, str]


def export(file: BankFile, outputs: Path = OUTPUTS, folder: Path = HERE) -> Path | None:
    """Write one file of the bank and return it, or None without any training."""
    found: list[ReadTraining] = []
    for study, arm in file.sources:
        found += read_trainings(StudyFolder(outputs / study), arm, file)
    if not found:
        return None
    shared = common(found)
    seed = shared["config"]["data"]["split_seed"]
    header = {
        "bank": file.name,
        "chosen_after": file.chosen_after,
        **shared,
        "look_rows": draw_rows(len(shared["tokens"]), (), LOOK_ROWS, seed),
        "provenance": {
            key: sorted({each.provenance[key] for each in found if key in each.provenance})
            for key in (*PROVENANCE, *_packages(found))
        },
    }
    lines = [{**each.line, "looks": _looks(each.line["looks"], header)} for each in found]
    return write_bank(file.name, header, lines, folder)


def read_trainings(study: StudyFolder, arm: str, file: BankFile) -> list[ReadTraining]:
    """Return the trainings of an arm that belong to the bank, the first of each point and seed."""
    found: dict[str, ReadTraining] = {}
    for folder, outcome in ended_folders(study, arm):
        read = read_training(folder, outcome, file)
        read.line["id"] = f"{study.path.name}/{arm}/{folder.path.name}"
        found.setdefault(json.dumps([read.line["point"], read.line["seed"]]), read)
    return list(found.values())


def read_training(folder: TrialFolder, outcome: Mapping[str, Any], file: BankFile) -> ReadTraining:
    """Return a training with the losses of every row of its looks."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    metrics, looks = outcome["metrics"], read_looks(folder.look_losses)
    line = {
        "id": "",
        **_place(config, file),
        "warmup_steps": _whole(metrics.get("training/warmup_steps")),
        "trainable": _whole(metrics.get("parameters/trainable")),
        "cause": outcome["cause"],
        "steps": outcome["steps"],
        "value": outcome["best_value"],
        "best_step": outcome["best_step"],
        **_steps(folder),
        "cpu_train": _rounded(metrics.get("cost/train_cpu_seconds"), 3),
        "cpu_total": _rounded(cpu_seconds(outcome), 3),
        "looks": looks,
    }
    shared = {
        "config": config,
        "inputs": {key: (outcome.get("inputs") or {}).get(key) for key in INPUTS},
        "total_steps": _whole(metrics.get("training/total_steps")),
        # a training that diverges before its first look has seen no row
        "rows": {look.rows for look in looks},
        "tokens": {look.tokens for look in looks},
    }
    provenance = json.loads(folder.provenance.read_text(encoding="utf-8"))
    return ReadTraining(line, shared, {key: str(value) for key, value in provenance.items()})


def _place(config: dict[str, Any], file: BankFile) -> dict[str, Any]:
    """Take the point and the seed out of a training's configuration."""
    point = {key: _pop(config, key) for key in file.keys}
    full = file.keys == FULL_KEYS
    return {
        "role": "full" if full else "factorial" if is_factorial(point) else "continuous",
        "point": point,
        "seed": config.pop("seed"),
        "alpha": None if full else point[RANK] * point[RATIO],
    }


def _steps(folder: TrialFolder) -> dict[str, Any]:
    """Return the logged loss and gradient norm of each training step."""
    rows = [row for row in read_spool(folder.metrics) if "train/loss" in row]
    return {
        "train_loss": [_rounded(row["train/loss"], 5) for row in rows],
        "grad_norm": [_rounded(row.get("train/grad_norm"), 5) for row in rows],
    }


def common(found: Sequence[ReadTraining]) -> dict[str, Any]:
    """Return the properties that all trainings of a file share.

    Raises:
        SystemExit: they differ, so they are not trainings of one question.
    """
    shared: dict[str, Any] = {}
    for key in ("config", "inputs", "total_steps"):
        values = [each.shared[key] for each in found]
        _require_one(key, [values[0], *(value for value in values if value != values[0])], found)
        shared[key] = values[0]
    for key in ("rows", "tokens"):
        each = set().union(*(read.shared[key] for read in found))
        _require_one(key, list(each), found)
        (value,) = each
        shared[key] = list(value) if key == "tokens" else value
    return shared


def _require_one(key: str, values: Sequence[object], found: Sequence[ReadTraining]) -> None:
    if len(values) != 1:
        example = found[0].line["id"]
        raise SystemExit(
            f"{key} is not the same in all trainings of this file, as in {example}: "
            f"{len(values)} different values. Trainings of another question are in the folder"
        )


def _looks(looks: Sequence[StoredLook], header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return looks as the bank stores them."""
    tokens, sample = header["tokens"], header["look_rows"]
    with_rows = {round(share * header["total_steps"]) for share in ROWS_AT}
    return [
        {
            "step": look.step,
            "loss": _rounded(math.fsum(look.nll) / sum(tokens), 9),
            "sample_loss": _rounded(
                math.fsum(look.nll[row] for row in sample) / sum(tokens[row] for row in sample), 9
            ),
            "cpu": _rounded(look.cpu_seconds, 3),
            **({"nll": _rows(look)} if look.step in with_rows else {}),
        }
        for look in looks
    ]


def _rows(look: StoredLook) -> list[float | None]:
    # three digits: of the mean over 333 rows, that is less than 1e-6 nats
    return [_rounded(value, 3) for value in look.nll]


def _pop(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return config[section].pop(name)


def _packages(found: Iterable[ReadTraining]) -> list[str]:
    return sorted({key for each in found for key in each.provenance if key.startswith("package.")})


def _rounded(value: float | None, digits: int) -> float | None:
    """Return a rounded number, or None for one that JSON cannot hold: a training that diverged."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def main(names: Sequence[str]) -> None:
    """Export the named files of the bank, or all."""
    known = {file.name: file for file in FILES}
    if unknown := set(names) - known.keys():
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}. Parts: {', '.join(known)}")
    for name in names or known:
        path = export(known[name])
        size = "nothing trained yet" if path is None else f"{path.stat().st_size / 2**20:.2f} MiB"
        print(f"{name}: {size}")


if __name__ == "__main__":
    main(sys.argv[1:])
