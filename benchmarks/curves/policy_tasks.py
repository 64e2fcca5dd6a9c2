"""The tables that policies are judged on: the exported banks, and tinker-cookbook's final values.

Knows the points and their worth, and neither samplers nor studies.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.curves.bank_points import RANK, RATE, RATIO, TARGETS, WARMUP
from benchmarks.curves.bank_surface import BankSurface, fit_surface
from benchmarks.curves.curve_bank import HERE, has_bank, read_bank
from benchmarks.curves.replayed_study import CurveTable, RecordedCurve, recorded_curves

BUDGET = 36.0
"""Trial-equivalents of a study."""
TINKER_BUDGET = 12.0
"""Trials of a study on a table of final values, which has 4 to 20 cells a model."""
NEAR = 0.01
"""Regret in nats that a policy is timed to."""
TINKER_TABLE = HERE / "tinker_sft_sweep.csv"


@dataclass(frozen=True)
class PolicyTask:
    """A table of curves with its true values, and how a policy searches it."""

    table: CurveTable
    worth: NDArray[np.float64]
    """True value of each curve's point, in nats per token."""
    space: tuple[str, ...]
    """Overrides that make the product's space that of the table."""
    known: str
    """The known point, as an override's mapping."""
    budget: float = BUDGET
    """Trial-equivalents of a study."""


def space_of(table: CurveTable) -> tuple[str, ...]:
    """Return the overrides under which the product searches a table's points and no others."""
    levels = table.levels()
    rates = levels[RATE]
    found = [f"{RATE}=tag(log, interval({rates[0]}, {rates[-1]}))"]
    for key in (RANK, RATIO, TARGETS, WARMUP):
        values = levels[key]
        words = ", ".join(map(str, values))
        found.append(f"{key}=choice({words})" if len(values) > 1 else f"{key}={words}")
    return tuple(found)


def bank_task(name: str, folder: Path = HERE) -> tuple[PolicyTask, dict[str, Any]]:
    """Return the task of a bank, and figures about the bank."""
    header, trials = read_bank(name, folder)
    of_grid = [trial for trial in trials if trial["role"] == "factorial"]
    table = CurveTable(recorded_curves(header, of_grid), header["total_steps"])
    values = [curve.value() for curve in table.curves]
    repeats = f"{name}_seeds"
    fresh = fresh_means(table.curves, repeats, folder) if has_bank(repeats, folder) else {}
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    surface = fit_surface(
        [table.curves[index].point for index in finite],
        [values[index] for index in finite],
        [fresh.get(index) for index in finite],
    )
    worth = np.full(len(values), max(value for value in values if math.isfinite(value)))
    worth[finite] = surface.values
    between = [trial for trial in trials if trial["role"] == "continuous" and trial["value"]]
    figures = {
        "base": header["config"]["model"]["base_model"],
        "data": header["config"]["data"]["train"],
        "machine": header["provenance"].get("cpu"),
        "curves": len(values),
        "diverged": len(values) - len(finite),
        "points with further seeds": len(fresh),
        "surface, error of the best half left out": round(surface.error_of_best_half, 4),
        "surface, error between its points": _of_better_half(between, surface),
        "points within .01 of the best": int((worth <= worth.min() + NEAR).sum()),
    }
    ratio = min(table.levels()[RATIO], key=lambda value: abs(math.log(value / 2)))
    known = f"{{{RATE}: 5e-3, {RANK}: 8, {RATIO}: {ratio}, {TARGETS}: all-linear}}"
    return PolicyTask(table, worth, space_of(table), known), figures


def _of_better_half(between: Sequence[Mapping[str, Any]], surface: BankSurface) -> float | None:
    """Return the root mean square error at the better half of points that are not in the surface."""
    if not between:
        return None
    better = sorted(between, key=lambda trial: float(trial["value"]))[: -(-len(between) // 2)]
    values = np.array([trial["value"] for trial in better])
    predicted = surface.at_points([trial["point"] for trial in better])
    return round(float(np.sqrt(np.mean((predicted - values) ** 2))), 4)


def fresh_means(
    curves: Sequence[RecordedCurve], repeats: str, folder: Path = HERE
) -> dict[int, float]:
    """Return the mean value over further seeds of each curve that has any, by its index."""
    header, trials = read_bank(repeats, folder)
    found: dict[int, list[float]] = {}
    index_of = {_key(curve.point): index for index, curve in enumerate(curves)}
    for curve in recorded_curves(header, trials):
        index = index_of.get(_key(curve.point))
        if index is not None and math.isfinite(curve.value()):
            found.setdefault(index, []).append(curve.value())
    return {index: statistics.fmean(values) for index, values in found.items()}


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))


def tinker_tasks() -> dict[str, PolicyTask]:
    """Return a task for each model of the table of final values: no looks, alpha 32 throughout."""
    losses: dict[str, dict[tuple[float, int], list[float]]] = {}
    with TINKER_TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cell = float(row["learning_rate"]), int(row["lora_rank"])
            losses.setdefault(row["model"], {}).setdefault(cell, []).append(float(row["test_nll"]))
    return {model: _tinker_task(cells) for model, cells in losses.items()}


def _tinker_task(cells: Mapping[tuple[float, int], Sequence[float]]) -> PolicyTask:
    curves: list[RecordedCurve] = []
    for (rate, rank), values in cells.items():
        end = {1: statistics.fmean(values)}  # some cells were run twice
        curves.append(RecordedCurve({RATE: rate, RANK: rank}, end, end, steps=1))
    table = CurveTable(curves, total_steps=1)
    levels = table.levels()
    ranks = levels[RANK]
    choice = f"choice({', '.join(map(str, ranks))})" if len(ranks) > 1 else str(ranks[0])
    space = (
        f"{RATE}=tag(log, interval({levels[RATE][0]}, {levels[RATE][-1]}))",
        f"{RANK}={choice}",
        *(f"{RATIO}=null", "adapter.lora_alpha=32", f"{TARGETS}=all-linear", f"{WARMUP}=0.03"),
    )
    known = f"{{{RATE}: 3e-4, {RANK}: {ranks[-1]}}}"
    worth = np.array([curve.value() for curve in curves])
    return PolicyTask(table, worth, space, known, TINKER_BUDGET)
