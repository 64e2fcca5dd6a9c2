"""Which points come first on a base that was not trained before?

    python -m benchmarks.recipe_choice

Reads recipe_choice.csv: final test losses of LoRA fine-tunes of 35 models over learning rate and
rank, from the results of the supervised sweep of thinking-machines-lab/tinker-cookbook (Apache-2.0,
commit 9dfcc3a2). The conditions are one: data set tulu3, batch 128, 780 steps, one seed, alpha 32
whatever the rank, all linear layers. Losses of models with different tokenizers do not compare, so
a point is judged by its regret: its loss minus that of the model's best cell. A few models were
trained at other rates than the rest. For them the nearest rate that was tried stands in. Where a
rate was tried with other ranks and the cell is missing, the training diverged, and the point has
the regret of the model's worst cell.

A table that ends at rank 4 says nothing about rank 64. Points are therefore chosen from the models
whose table tried rank 64 or more. They are chosen one after the other, each so that the mean regret
of the best point so far is lowest. How good a choice is on a model is measured with the model's
family left out of the choice.

Writes recipe_choice.json next to this file.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.record import record

TABLE = Path(__file__).with_name("recipe_choice.csv")
LEAST_RANK = 64
COUNT = 2
"""Number of points to choose."""
SMALL = (
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-8B-Base",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
)
"""Models of the table with up to 8B parameters."""

Cell = tuple[float, int]
"""A learning rate and a rank."""
Losses = Mapping[str, Mapping[Cell, float]]
"""Test loss in nats per token, by model and cell."""


def read_table(path: Path = TABLE) -> Losses:
    """Return the losses of the table."""
    found: dict[str, dict[Cell, float]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cell = float(row["learning_rate"]), int(row["lora_rank"])
            found[row["model"]][cell] = float(row["test_nll"])
    return found


def with_large_ranks(table: Losses, least: int = LEAST_RANK) -> Losses:
    """Return the models whose table tried a rank of at least this size."""
    return {
        model: cells for model, cells in table.items() if any(rank >= least for _, rank in cells)
    }


def regret(cells: Mapping[Cell, float], points: Sequence[Cell]) -> float:
    """Return the loss of the best of some points minus the best loss of the model."""
    return min(_loss(cells, point) for point in points) - min(cells.values())


def _loss(cells: Mapping[Cell, float], point: Cell) -> float:
    """Return the loss of a model at a point, or at the nearest rate that the model was trained at."""
    rate, rank = point
    tried = {each for each, _ in cells}
    nearest = min(tried, key=lambda each: (abs(math.log(each / rate)), each))
    return cells.get((nearest, rank), max(cells.values()))


def mean_regret(table: Losses, points: Sequence[Cell]) -> float:
    """Return the mean regret of the best of some points over models."""
    return statistics.fmean(regret(cells, points) for cells in table.values())


def choose(table: Losses, count: int = COUNT, rank: int = LEAST_RANK) -> list[Cell]:
    """Return points of a rank, each chosen so that the mean regret of the best so far is lowest.

    Offered are the points that at least half of the models were trained at.
    """
    trained = Counter(cell for cells in table.values() for cell in cells)
    offered = sorted(
        cell for cell, models in trained.items() if cell[1] == rank and 2 * models >= len(table)
    )
    chosen: list[Cell] = []
    for _ in range(count):
        best = min(offered, key=lambda cell: mean_regret(table, [*chosen, cell]))
        chosen.append(best)
    return chosen


def family(model: str) -> str:
    """Return the family of a model: the organisation and the name up to the size."""
    owner, _, name = model.partition("/")
    return f"{owner}/{name.partition('-')[0]}"


def left_out(table: Losses, count: int) -> dict[str, float]:
    """Return the regret on each model of the points that are chosen without the model's family."""
    found: dict[str, float] = {}
    for model, cells in table.items():
        others = {name: each for name, each in table.items() if family(name) != family(model)}
        found[model] = regret(cells, choose(others, count))
    return found


def main() -> None:
    """Choose the points and record what they are worth."""
    table = read_table()
    large = with_large_ranks(table)
    small = {model: cells for model, cells in large.items() if model in SMALL}
    chosen = choose(large)
    groups = {"all": large, "up to 8B": small}
    points = {
        **{f"{rate:g} at r={rank}": [(rate, rank)] for rate, rank in chosen},
        "the better of both": chosen,
        "3e-4 at r=16, an earlier default": [(3e-4, 16)],
    }
    record(
        "recipe_choice",
        {
            "models": len(table),
            "models with large ranks": sorted(large),
            "chosen": [list(cell) for cell in chosen],
            "mean regret": {
                name: {group: round(mean_regret(each, cells), 5) for group, each in groups.items()}
                for name, cells in points.items()
            },
            "worst regret of the better of both": round(
                max(regret(cells, chosen) for cells in large.values()), 5
            ),
            "mean regret with the family left out": {
                f"{count} points": round(statistics.fmean(left_out(large, count).values()), 5)
                for count in range(1, COUNT + 1)
            },
        },
    )


if __name__ == "__main__":
    main()
