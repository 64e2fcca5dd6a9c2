"""Search with two samplers in real trainings, not replayed, and compare the best loss by CPU time.

    python -m benchmarks.real_searches FOLDER [embedded|chat]     # both data sets by default

Two searches of ten trials for each of five seeds of the sampler, on the embedded base with its own rows
and with conversations: with the default sampler, and with the one that was the default before it. Both
have the default pruner. No search has a known point, because both would begin with the same one. The
seed of training stays, so that a point is worth the same in every search. Searches with the same seed
are a pair and run at the same time, one thread each, so that both have the same machine.

The sign of the paired differences is tested exactly (two-sided binomial test, equal pairs left out).
About 15 CPU minutes for each data set. The same command continues where it was stopped.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from scipy.stats import binomtest

from benchmarks.curves.curve_bank import HERE as CURVES
from benchmarks.curves.make_curves import CHAT
from benchmarks.record import record
from benchmarks.searched_folder import sweep
from sweeper.core.outcome import Outcome
from sweeper.reporting.chart import ChartLine, number_axis, plot, standalone

N_TRIALS = 10
SEEDS = (0, 100, 200, 300, 400)
"""Seeds of the sampler, far apart: a resumed study adds the number of values drawn so far."""
COMMON = (
    *("hydra.sweeper.priors=[]", "hydra.sweeper.n_jobs=1"),
    *("data=tiny", "evaluation=tiny", "training=tiny", "space=tiny"),
)
SEARCHES = {
    "TPE, median": ("sampler=tpe", "pruner=median"),
    "lora, median": ("sampler=lora", "pruner=median"),
}
DATA = {
    "embedded": (),
    "chat": (CHAT[0], f"data.template={CURVES / 'chat_turns.jinja'}", *CHAT[2:]),
}
MINUTE = 60.0
SHOWN = 0.08
"""Nats above the best loss up to which the picture reaches."""

Curve = list[tuple[float, float]]
"""CPU seconds spent in all, and the best loss until then, after each trial."""


def curve(trials: Sequence[FrozenTrial]) -> Curve:
    """Return the best loss after each trial. A pruned trial costs time and has no loss of its own."""
    spent, best, found = 0.0, math.inf, []
    for trial in trials:
        outcome = Outcome.model_validate(trial.user_attrs["outcome"])
        spent += float(outcome.metrics["cost/cpu_seconds"])
        if trial.state is TrialState.COMPLETE:
            best = min(best, trial.values[0])
        found.append((spent, best))
    return found


def best_within(curve: Curve, seconds: float) -> float:
    """Return the best loss of the trials that ended within so many CPU seconds, or infinity."""
    return min((best for spent, best in curve if spent <= seconds), default=math.inf)


def sign_test(before: Sequence[float], now: Sequence[float]) -> dict[str, Any]:
    """Return how many pairs are better, equal and worse, with the exact two-sided p value."""
    better = sum(new < old for old, new in zip(before, now, strict=True))
    worse = sum(new > old for old, new in zip(before, now, strict=True))
    decided = better + worse
    p_value = float(binomtest(better, decided).pvalue) if decided else 1.0
    pairs = {"better": better, "equal": len(before) - decided, "worse": worse}
    return {**pairs, "p, two-sided": round(p_value, 4)}


def compare(curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    """Return the best losses of two searches after each CPU minute that all of them have."""
    last = min(curve[-1][0] for each in curves.values() for curve in each)
    minutes = range(1, int(last // MINUTE) + 1)
    old, new = SEARCHES
    rows = {}
    for minute in minutes:
        best = {name: [best_within(c, minute * MINUTE) for c in curves[name]] for name in curves}
        means = {
            name: round(statistics.fmean(values), 4) if all(map(math.isfinite, values)) else None
            for name, values in best.items()
        }
        rows[minute] = {"mean": means, "signs": sign_test(best[old], best[new])}
    whole = {name: [curve[-1][1] for curve in each] for name, each in curves.items()}
    return {
        "after CPU minutes": rows,
        "after all trials": {
            "best": {name: [round(value, 4) for value in each] for name, each in whole.items()},
            "mean": {name: round(statistics.fmean(each), 4) for name, each in whole.items()},
            "signs": sign_test(whole[old], whole[new]),
        },
        "CPU seconds": {
            name: [round(curve[-1][0], 1) for curve in each] for name, each in curves.items()
        },
        "curves": {
            name: [[(round(spent, 1), round(best, 5)) for spent, best in curve] for curve in each]
            for name, each in curves.items()
        },
    }


def picture(data: str, curves: Mapping[str, Sequence[Curve]]) -> str:
    """Return the best loss of each search over CPU minutes as an SVG file, with the means in front."""
    ends = [curve[-1][1] for each in curves.values() for curve in each]
    lines = []
    for place, (name, each) in enumerate(curves.items()):
        for seed, points in zip(SEEDS, each, strict=True):
            # from a random first point on, the differences at the end would be too small to see
            near = [(spent / MINUTE, best) for spent, best in points if best <= min(ends) + SHOWN]
            lines.append(ChartLine(stairs(near), f"{name}, seed {seed}", place))
        mean = [(minute, loss) for minute, loss in mean_curve(each) if loss <= min(ends) + SHOWN]
        lines.append(ChartLine(stairs(mean), f"{name}, mean", place, strong=True))
    points = [point for line in lines for point in line.points]
    axes = (
        number_axis("CPU minutes", [0.0, *(minute for minute, _ in points)]),
        number_axis("best loss so far", [loss for _, loss in points]),
    )
    about = f"Five seeds of each search, ten trials each, and their means: {data}"
    drawn = [line for line in lines if line.points]
    return standalone(plot(f"Best loss by CPU time, {data}", about, axes, (), drawn, tuple(curves)))


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Return the mean of the best losses at each CPU minute at which one of the searches found one."""
    last = min(curve[-1][0] for curve in curves)
    times = sorted({spent for curve in curves for spent, _ in curve if spent <= last})
    means = [(at, statistics.fmean(best_within(curve, at) for curve in curves)) for at in times]
    return [(at / MINUTE, mean) for at, mean in means if math.isfinite(mean)]


def stairs(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the corners of a line that holds each value until the next one."""
    corners = list(points[:1])
    for (_, before), (minute, loss) in itertools.pairwise(points):
        corners += [(minute, before), (minute, loss)]
    return tuple(corners)


def main(root: Path, names: Sequence[str]) -> None:
    """Run the searches that are missing, write the figures, and draw the pictures."""
    figures = {}
    for data in names or DATA:
        overrides = DATA[data]
        curves: dict[str, list[Curve]] = {name: [] for name in SEARCHES}
        for seed in SEEDS:
            with ThreadPoolExecutor(len(SEARCHES)) as pool:
                jobs = {
                    name: pool.submit(
                        sweep,
                        root / data / f"{seed}_{place}",
                        N_TRIALS,
                        *(*COMMON, *overrides, *words, f"sampler.seed={seed}"),
                    )
                    for place, (name, words) in enumerate(SEARCHES.items())
                }
            for name, job in jobs.items():
                curves[name].append(curve(job.result()))
        figures[data] = compare(curves)
        image = Path(__file__).with_name(f"real_searches_{data}.svg")
        image.write_text(picture(data, curves), encoding="utf-8")
    record("real_searches", figures)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
