"""What TPE and the median pruner are worth on the embedded default: against random search, and unpruned.

Three searches with the same number of training steps, five seeds of the sampler each, all by the
program's own command line:

    random     points drawn uniformly, every trial to its own end: the yardstick
    unpruned   TPE, every trial to its own end
    default    TPE and the median pruner, the defaults until sampler=lora became one

The seed of training stays, so that a point is worth the same in every search; what varies is what is
asked. TPE's first trials are random draws anyway: they are made once per seed and the
study's folder is copied, so that the three searches of a seed start alike (and nothing is trained
three times). No search gets the known points of conf/space/tiny.yaml, so none is told apart.

The two searches without pruning run under `pruner.audit_fraction=1.0`: their trials go on where the
median pruner would have stopped them, which changes nothing that a sampler is told and counts the
wrong kills. In service the pruner is stricter, since its median is that of survivors; so the points
that the default search pruned are trained to their end afterwards, in a study of their own. The
default search gets more trials until it has spent the others' steps; curves are cut at the number of
steps that all three have. Random search's best often lies in the common start, and is then reached
by all three at once; so each search's best is also ranked among all random points of all seeds.

A trial is half the default schedule, half its batch, and looks at a third of the validation split
while it trains (the kept checkpoint is judged on all of it). That this ranks points as the default
does is measured too: ten of the random points are trained under both.

    python -m benchmarks.search_quality [FOLDER [SEARCHES AT ONCE]]

About forty CPU minutes; started again it goes on where it was stopped.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from scipy.stats import spearmanr

from benchmarks.record import record
from benchmarks.searched_folder import sweep, trials
from sweeper.config.settings import Objective
from sweeper.search.pruning_audit import PruningAudit, audit

SHORT = (
    *("training.max_steps=32", "training.per_device_train_batch_size=8"),
    "evaluation.look_rows=111",
)
NO_PRIORS = "hydra.sweeper.priors=[]"
SEARCHES = {
    "random": ("sampler=random", "pruner=median", "pruner.audit_fraction=1.0", NO_PRIORS),
    "unpruned": ("sampler=tpe", "pruner=median", "pruner.audit_fraction=1.0", NO_PRIORS),
    "default": ("sampler=tpe", "pruner=median", NO_PRIORS),
}
SEEDS = (0, 100, 200, 300, 400)
"""Far apart: a resumed study's sampler adds the number of values drawn so far."""
N_TRIALS = 12
"""The experiment's own."""
START = 4
"""How many of them TPE draws at random (conf/sampler/tpe.yaml)."""
CHECKED = 2
"""Of these, trained with the whole default schedule as well."""
LOSS = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)

Curve = list[tuple[int, float]]
"""Steps spent in all, and the best final loss until then, after each trial."""


def steps(trial: FrozenTrial) -> int:
    """Optimiser steps that a trial was trained."""
    return int(trial.user_attrs["outcome"]["steps"])


def run_seed(root: Path, seed: int) -> dict[str, list[FrozenTrial]]:
    """The three searches from one start, and what the default one pruned, trained to its end."""
    start = root / f"seed_{seed}" / "start"
    drawn = f"sampler.seed={seed}"
    sweep(start, START, *SHORT, *SEARCHES["random"], drawn)
    found = {}
    for name, arguments in SEARCHES.items():
        folder = start.with_name(name)
        if not folder.exists():
            copy = start.with_name(f"copy_{name}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(start, copy)
            copy.rename(folder)
        found[name] = sweep(folder, N_TRIALS, *SHORT, *arguments, drawn)
    budget = sum(map(steps, found["unpruned"]))
    folder = start.with_name("default")
    while (spent := sum(map(steps, found["default"]))) < budget:
        more = -(-(budget - spent) // max(map(steps, found["default"])))
        wanted = len(found["default"]) + more
        found["default"] = sweep(folder, wanted, *SHORT, *SEARCHES["default"], drawn)
    pruned = [trial for trial in found["default"] if trial.state is TrialState.PRUNED]
    found["killed"] = sweep(start.with_name("killed"), len(pruned), *SHORT, *points(pruned))
    return found


def points(asked: Sequence[FrozenTrial]) -> tuple[str, ...]:
    """The words that have just these trials' points tried, every one to its end."""
    priors = ", ".join(
        "{" + ", ".join(f"{key}: {value}" for key, value in trial.user_attrs["point"].items()) + "}"
        for trial in asked
    )
    return "sampler=random", "pruner=none", f"hydra.sweeper.priors=[{priors}]"


def curve(search: Sequence[FrozenTrial]) -> Curve:
    """How the best came down; a pruned trial costs steps and is worth nothing."""
    spent, best, found = 0, float("inf"), []
    for trial in search:
        spent += steps(trial)
        if trial.state is TrialState.COMPLETE:
            best = min(best, trial.values[0])
        found.append((spent, best))
    return found


def best_within(curve: Curve, budget: int) -> float:
    """The best of the trials that ended within a number of steps."""
    return min(best for spent, best in curve if spent <= budget)


def steps_to(curve: Curve, loss: float) -> int | None:
    """Steps until a loss was reached; None if it never was."""
    return next((spent for spent, best in curve if best <= loss), None)


def compare(searches: Mapping[str, Sequence[FrozenTrial]]) -> dict[str, Any]:
    """The three searches of a seed."""
    curves = {name: curve(searches[name]) for name in SEARCHES}
    budget = min(curve[-1][0] for curve in curves.values())
    target = best_within(curves["random"], budget)
    return {
        "steps": budget,
        "trials": {name: sum(s <= budget for s, _ in curves[name]) for name in SEARCHES},
        "best": {name: best_within(curves[name], budget) for name in SEARCHES},
        "steps to random's best": {name: steps_to(curves[name], target) for name in SEARCHES},
        "curves": curves,
    }


def gain(seed: Mapping[str, Any], search: str) -> float:
    """Nats that a search is ahead of random search."""
    return float(seed["best"]["random"] - seed["best"][search])


def even_odds(drawn: Sequence[float], loss: float) -> float | None:
    """How many random draws reach a loss with even odds, going by these; None if none of them does."""
    share = sum(value <= loss for value in drawn) / len(drawn)
    return round(math.log(0.5) / math.log(1 - share), 1) if share else None


def ratios(seeds: Sequence[Mapping[str, Any]], search: str) -> list[float]:
    """Random search's steps to its best over a search's to the same; 0 where it never got there."""
    needed = [seed["steps to random's best"] for seed in seeds]
    return [row["random"] / row[search] if row[search] else 0.0 for row in needed]


def summary(seeds: Sequence[Mapping[str, Any]], drawn: Sequence[float]) -> dict[str, Any]:
    """Medians over the seeds; a search that never reached random's best makes its ratio 0."""
    return {
        name: {
            "best, median": statistics.median(seed["best"][name] for seed in seeds),
            "trials, median": statistics.median(seed["trials"][name] for seed in seeds),
            "random's steps over its own, each": [round(r, 2) for r in ratios(seeds, name)],
            "random's steps over its own, median": round(statistics.median(ratios(seeds, name)), 2),
            "seeds better than random, equal, worse": [
                sum(gain(seed, name) > 0 for seed in seeds),
                sum(gain(seed, name) == 0 for seed in seeds),
                sum(gain(seed, name) < 0 for seed in seeds),
            ],
            "random points as good as its best, each": [
                sum(value <= seed["best"][name] for value in drawn) for seed in seeds
            ],
            "random trials for even odds of its median best": even_odds(
                drawn, statistics.median(seed["best"][name] for seed in seeds)
            ),
        }
        for name in SEARCHES
    }


def audited(search: Sequence[FrozenTrial]) -> PruningAudit | None:
    """Of a search whose trials went on where they would have been pruned."""
    ended = [trial for trial in search if trial.state is TrialState.COMPLETE]
    spared = [trial.values[0] for trial in ended if trial.user_attrs.get("audited")]
    others = [trial.values[0] for trial in ended if not trial.user_attrs.get("audited")]
    return audit(LOSS, others, spared)


def in_service(searches: Mapping[str, Sequence[FrozenTrial]]) -> PruningAudit | None:
    """Of the default search, whose pruned trials were trained to their end afterwards."""
    ended = [t.values[0] for t in searches["default"] if t.state is TrialState.COMPLETE]
    return audit(LOSS, ended, [trial.values[0] for trial in searches["killed"]])


def kills(audits: Sequence[PruningAudit | None]) -> dict[str, float]:
    """Audits of several seeds, added up."""
    found = [one for one in audits if one is not None]
    total = sum(one.audited for one in found)
    wrong, costly = sum(one.wrong for one in found), sum(one.costly for one in found)
    return {
        "pruned": total,
        "wrong": wrong,
        "costly": costly,
        "share wrong": round(wrong / total, 3),
        "share costly": round(costly / total, 3),
    }


def ranking(root: Path) -> dict[str, Any]:
    """The same random points under this benchmark's schedule and under the default one."""
    asked = [trial for seed in SEEDS for trial in trials(root / f"seed_{seed}" / "start")[:CHECKED]]
    whole = sweep(root / "whole_schedule", len(asked), *points(asked))
    pairs = [(short.values[0], long.values[0]) for short, long in zip(asked, whole, strict=True)]
    return {
        "points": len(pairs),
        "spearman": round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 3),
        "losses, short and whole": pairs,
    }


def main(root: Path, at_once: int) -> None:
    """Run what is missing, and write the figures."""
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(partial(run_seed, root), SEEDS))
    seeds = [compare(searches) for searches in found]
    drawn = [trial.values[0] for searches in found for trial in searches["random"]]
    record(
        "search_quality",
        {
            "random points of all seeds": len(drawn),
            "searches": summary(seeds, drawn),
            "wrong kills": {
                "random, audited": kills([audited(searches["random"]) for searches in found]),
                "unpruned, audited": kills([audited(searches["unpruned"]) for searches in found]),
                "default, in service": kills([in_service(searches) for searches in found]),
            },
            "schedule": ranking(root),
            "seeds": dict(zip(SEEDS, seeds, strict=True)),
        },
    )


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        Path(given[0] if given else "outputs/search_quality").resolve(),
        at_once=int(given[1]) if len(given) > 1 else 1,
    )
