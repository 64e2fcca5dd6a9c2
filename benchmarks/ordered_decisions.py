"""What it costs that a trial waits for the trials some places before it.

    python benchmarks/ordered_decisions.py

A trial is asked when a worker is free and every trial up to a fixed number of places before it has
ended, so that the search does not depend on what arrives first (sweeper/search/record_prefix.py). This
simulates the time until a study's last trial ends, relative to workers that never wait, over that number
of places. Trials differ in length as in three kinds of study:

- alike: one schedule, nothing pruned (within 3 %);
- pruned: a schedule whose trials differ by size, 30 % pruned at its first rungs, 20 % stopped early;
- lengths: as `pruned`, and the number of steps is searched (1, 2 or 4 units).

Writes ordered_decisions.json next to this file.
"""

from __future__ import annotations

import heapq
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from sweeper.search.record_prefix import reach

STUDIES = 2000
SEED = 1


def alike(draw: random.Random) -> float:
    """Return a trial's length."""
    return draw.uniform(0.97, 1.03)


def pruned(draw: random.Random) -> float:
    """Return a trial's length."""
    length, end = draw.uniform(0.85, 1.25), draw.random()
    if end < 0.3:
        return length * draw.choice([0.3, 0.5])
    return length * (draw.uniform(0.5, 1.0) if end < 0.5 else 1.0)


def lengths(draw: random.Random) -> float:
    """Return a trial's length."""
    return pruned(draw) * draw.choice([1, 2, 4])


KINDS: dict[str, Callable[[random.Random], float]] = {
    "alike": alike,
    "pruned": pruned,
    "lengths": lengths,
}


def ends_at(trials: Sequence[float], workers: int, places: int) -> float:
    """Return the time at which the last trial ends."""
    free, latest = [0.0] * workers, 0.0
    ended_by: list[float] = []
    """The time by which all trials up to each place have ended."""
    for place, length in enumerate(trials):
        start = heapq.heappop(free)
        if place >= places:
            start = max(start, ended_by[place - places])
        heapq.heappush(free, start + length)
        latest = max(latest, start + length)
        ended_by.append(latest)
    return latest


def cost(kind: str, n_trials: int, workers: int, places: int) -> float:
    """Return the mean time that waiting adds, as a share."""
    draw = random.Random(SEED)
    shares = []
    for _ in range(STUDIES):
        trials = [KINDS[kind](draw) for _ in range(n_trials)]
        waiting, never = (ends_at(trials, workers, each) for each in (places, n_trials))
        shares.append(waiting / never - 1)
    return round(statistics.mean(shares), 4)


def main() -> None:
    """Print and store the table."""
    rows = []
    for kind in KINDS:
        for n_trials in (12, 40):
            for workers in (2, 4, 8):
                choices = {
                    "n_jobs": workers,
                    "1.5 n_jobs": workers * 3 // 2,
                    "rule": reach(workers),
                }
                row = {name: cost(kind, n_trials, workers, at) for name, at in choices.items()}
                rows.append({"trials": kind, "n_trials": n_trials, "workers": workers, **row})
                print(rows[-1])
    answer = {"studies": STUDIES, "seed": SEED, "rule": "2 n_jobs - 1 places", "added time": rows}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
