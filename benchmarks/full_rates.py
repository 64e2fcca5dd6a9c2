"""How should a full fine-tuning arm spend seven trials on its rate: a grid and two points, or a sampler?

    python -m benchmarks.full_rates      # full_rates.json, in seconds

Replays searches on the recorded full fine-tunes of the bank (curves/README.md), whose rates are ninths
of a decade apart. A search gets the recorded value of the nearest rate. The regret of a search is that
of its best-looking rate on a curve smoothed over seven rates, so that the luck of one training counts
for little. The grids are placed at every ninth of a decade, because the best rate of another base falls
anywhere between the points of a grid. `sampler=lora` searches the same range, 60 seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from benchmarks.curves.curve_bank import read_bank
from benchmarks.record import record
from sweeper.config.settings import SamplerSettings
from sweeper.config.space import Interval
from sweeper.search.samplers import SamplerContext, make_sampler

RATE = "training.learning_rate"
TRIALS = 7
SEEDS = 60
HALF_DECADE = 0.5
AROUND = 3
"""Rates on each side of one over which the curve is smoothed."""

Values = NDArray[np.float64]


def smooth(logs: Values, values: Values) -> Values:
    """Return the value at each rate of a parabola through it and the nearest ones."""
    found = []
    for place, log in enumerate(logs):
        start = min(max(place - AROUND, 0), len(logs) - 2 * AROUND - 1)
        near = slice(start, start + 2 * AROUND + 1)
        found.append(np.polyval(np.polyfit(logs[near] - log, values[near], 2), 0.0))
    return np.array(found)


def nearest(logs: Values, wanted: float) -> int:
    """Return the index of the recorded rate that is nearest to a wanted one."""
    return int(np.argmin(np.abs(logs - wanted)))


def grids(logs: Values, count: int, step: float) -> Iterator[list[int]]:
    """Yield the recorded rates of each grid of equal steps that lies within the recorded range."""
    for start in logs:
        wanted = start + step * np.arange(count)
        if wanted[-1] <= logs[-1] + 1e-9:
            yield [nearest(logs, each) for each in wanted]


def refined(logs: Values, values: Values, grid: Sequence[int]) -> list[int]:
    """Return a grid with the two rates half-way between its best one and that one's neighbours."""
    best = min(grid, key=lambda index: values[index])
    at = grid.index(best)
    neighbours = [grid[place] for place in (at - 1, at + 1) if 0 <= place < len(grid)]
    return [*grid, *(nearest(logs, (logs[best] + logs[each]) / 2) for each in neighbours)]


def sampled(logs: Values, values: Values, seed: int) -> list[int]:
    """Return the rates that sampler=lora tries."""
    settings = SamplerSettings(
        name="lora", seed=seed, n_startup_trials=4, class_name=None, kwargs={}
    )
    domain = Interval(10 ** float(logs[0]), 10 ** float(logs[-1]), log=True)
    sampler = make_sampler(settings, {RATE: domain}, TRIALS, SamplerContext(adapter=None))
    study = optuna.create_study(sampler=sampler)
    tried = []
    for _ in range(TRIALS):
        trial = study.ask()
        rate = trial.suggest_float(RATE, domain.low, domain.high, log=True)
        tried.append(nearest(logs, math.log10(rate)))
        study.tell(trial, float(values[tried[-1]]))
    return tried


def summarise(values: Values, worth: Values, searches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the regrets of the best-looking rate of each search."""
    chosen = [min(search, key=lambda index: values[index]) for search in searches]
    regrets = [float(worth[index] - worth.min()) for index in chosen]
    return {
        "searches": len(searches),
        "trials": round(statistics.fmean(len(set(search)) for search in searches), 1),
        "mean regret": round(statistics.fmean(regrets), 5),
        "worst regret": round(max(regrets), 5),
    }


def main() -> None:
    """Replay the searches and write the figures."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _, trials = read_bank("full")
    ended = sorted(
        (math.log10(trial["point"][RATE]), float(trial["value"]))
        for trial in trials
        if trial["value"] is not None
    )
    logs, values = (np.array(column) for column in zip(*ended, strict=True))
    worth = smooth(logs, values)
    coarse = list(grids(logs, 5, HALF_DECADE))
    figures = {
        "grid of 5 half decades": coarse,
        "the same and 2 points beside its best": [refined(logs, values, each) for each in coarse],
        "grid of 7 third decades": list(grids(logs, 7, 1 / 3)),
        "sampler=lora, 7 trials": [sampled(logs, values, seed) for seed in range(SEEDS)],
    }
    record(
        "full_rates",
        {
            "rates": len(logs),
            "difference to the smooth curve, standard deviation": round(
                float((values - worth).std()), 5
            ),
            **{name: summarise(values, worth, found) for name, found in figures.items()},
        },
    )


if __name__ == "__main__":
    main()
