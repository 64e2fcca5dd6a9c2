"""Replay search policies on the bank of curves, in seconds instead of days of training.

    python -m benchmarks.policies                          # on every exported bank; policies.json
    python -m benchmarks.policies embedded --studies 20    # on one bank, without writing
    python -m benchmarks.policies tinker                   # final values of 35 models

A policy is a command line of the product. Sampler, pruner, known points and stop rules are the product's
own (curves/replayed_study.py), except the stop by a fixed gap in nats and halving with pausing. Each
policy runs many simulated studies with other seeds of the sampler, until a budget is spent. The unit, a
trial-equivalent, is one training and one whole judgement. What ends beyond the budget does not count.

The regret of a study is that of its best-looking trial: the worth of its point on the surface that is
fitted to the bank (curves/bank_surface.py), minus the best worth of any point. Intervals are 95 %
bootstrap over studies. Figures belong to the base and data of their bank, costs to its machine.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from benchmarks.curves.curve_bank import has_bank
from benchmarks.curves.policy_tasks import (
    BUDGET,
    NEAR,
    TINKER_BUDGET,
    PolicyTask,
    bank_task,
    tinker_tasks,
)
from benchmarks.curves.replayed_study import (
    EndedTrial,
    GapGuard,
    GuardMaker,
    ReplayedStudy,
    product_guard,
    run_halving,
    run_in_turn,
)
from benchmarks.record import record
from sweeper.core.outcome import SELF_ENDED
from sweeper.search.study_plan import StudyPlan, studies

BANKS = ("embedded", "base", "chat")
STUDIES = 200
GP_STUDIES = 60
"""Studies of policies whose sampler takes seconds a trial."""
GRID = np.arange(1.0, BUDGET + 0.01, 0.25)
REPORTED_AT = (2, 6, 12, 24)
CHUNK = 10
"""Studies of one task of a process."""
COMMON = (
    *("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full", "finalists=none", "tracking=none"),
    *("data=tiny", "evaluation=tiny", "training=tiny", "space=tiny"),
)


@dataclass(frozen=True)
class SearchPolicy:
    """A way to search, as overrides of the product's command line."""

    overrides: tuple[str, ...]
    run: Callable[[ReplayedStudy, float], None] = run_in_turn
    gap: float | None = None
    """Nats behind the best look at 25 % at which a trial is stopped. None: the pruner decides."""
    known: bool = False
    """True if the product's default point comes first."""
    studies: int = STUDIES


def _policy(sampler: str, pruner: str = "none", **changes: Any) -> SearchPolicy:
    slow = sampler in ("gp", "lora")
    count = GP_STUDIES if slow else STUDIES
    return SearchPolicy((f"sampler={sampler}", f"pruner={pruner}"), studies=count, **changes)


POLICIES = {
    "random": _policy("random"),
    "TPE": _policy("tpe"),
    "Optuna's GP": _policy("gp"),
    "lora": _policy("lora"),
    "random, median": _policy("random", "median"),
    "TPE, median": _policy("tpe", "median"),
    "lora, median": _policy("lora", "median"),
    "TPE, gap": _policy("tpe", "gap"),
    "lora, gap": _policy("lora", "gap"),
    "TPE, gap .03": _policy("tpe", gap=0.03),
    "Optuna's GP, gap .03": _policy("gp", gap=0.03),
    "lora, gap .03": _policy("lora", gap=0.03),
    "random, halving with pausing": _policy("random", run=run_halving),
    "TPE, halving with pausing": _policy("tpe", run=run_halving),
    "lora, halving with pausing": _policy("lora", run=run_halving),
    "TPE after the known point": _policy("tpe", known=True),
    "TPE, median after the known point": _policy("tpe", "median", known=True),
    "lora after the known point": _policy("lora", known=True),
    "lora, median after the known point": _policy("lora", "median", known=True),
    "lora, gap after the known point": _policy("lora", "gap", known=True),
}
YARDSTICK = "TPE"
"""Policy that others are compared with: unpruned TPE."""
FROZEN = "lora, gap after the known point"
"""The policy that was chosen for the default, in the commit that names it here: by 312 trainings of the
embedded base that were made before this bank, and before any policy was replayed on `base` or `chat`."""
FINAL_VALUES = (
    *("random", "TPE", "Optuna's GP", "lora"),
    *("TPE after the known point", "lora after the known point"),
)
"""Policies that need no look, for tables of final values."""


@dataclass(frozen=True)
class StudyFigures:
    """Regrets and kills of one simulated study within its budget."""

    regrets: NDArray[np.float64]
    """Regret of the best-looking trial at each of GRID."""
    kills: int
    wrong: int
    """Kills of trials that would have ended better than the median of those that ended."""
    costly: int
    """Kills of trials that would have ended better than the best of those that ended."""
    finished: int


@cache
def plan_of(words: tuple[str, ...]) -> StudyPlan:
    """Return the product's plan of a command line."""
    (plan,) = studies(words)
    return plan


def guard_of(policy: SearchPolicy) -> GuardMaker:
    """Return the function that makes the guards of a policy's trials."""
    gap = policy.gap
    if gap is None:
        return product_guard
    return lambda study, trial: GapGuard(study, trial, gap)


def replay(task: PolicyTask, name: str, seed: int) -> StudyFigures:
    """Run one simulated study of a policy."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    policy = POLICIES[name]
    # explicit, because the space may bring known points of its own
    known = f"hydra.sweeper.priors=[{task.known if policy.known else ''}]"
    plan = plan_of((*COMMON, *policy.overrides, *task.space, known))
    study = ReplayedStudy(plan, task.table, seed, guard_of(policy))
    policy.run(study, task.budget)
    return figures_of(study.ended, task)


def figures_of(ended: Sequence[EndedTrial], task: PolicyTask) -> StudyFigures:
    """Return the figures of a study from its trials, as far as they ended within the budget."""
    within = [trial for trial in ended if trial.spent <= task.budget]
    finished = [trial for trial in within if trial.cause in SELF_ENDED]
    killed = [task.table.curves[trial.index].value() for trial in within if trial.cause == "pruned"]
    values = [trial.value for trial in finished]
    middle, best = (statistics.median(values), min(values)) if values else (math.inf, math.inf)
    return StudyFigures(
        regrets_of(finished, task.worth),
        len(killed),
        sum(value < middle for value in killed),
        sum(value < best for value in killed),
        len(finished),
    )


def regrets_of(finished: Sequence[EndedTrial], worth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the regret of the trial that looks best at each of GRID.

    Before the first trial has ended, the regret is that of the median point, as of a guess.
    """
    regrets = np.full(len(GRID), float(np.median(worth) - worth.min()))
    best = math.inf
    for trial in finished:
        if trial.value < best:
            best = trial.value
            regrets[trial.spent <= GRID] = worth[trial.index] - worth.min()
    return regrets


def equivalents_to(regrets: NDArray[np.float64], wanted: float) -> float:
    """Return the trial-equivalents at which a mean regret is first reached, or infinity."""
    reached = np.flatnonzero(np.minimum.accumulate(regrets) <= wanted)
    return float(GRID[reached[0]]) if len(reached) else math.inf


def summarise(found: Sequence[StudyFigures], budget: float) -> dict[str, Any]:
    """Return the figures of a policy over its studies, as far as their budget goes."""
    regrets = np.array([study.regrets for study in found])
    means = resampled(regrets)
    kills = sum(study.kills for study in found)
    row: dict[str, Any] = {"studies": len(found)}
    for spent in (each for each in REPORTED_AT if each <= budget):
        column = int(np.searchsorted(GRID, spent))
        there = regrets[:, column]
        row[f"regret at {spent}"] = round(float(there.mean()), 5)
        row[f"regret at {spent}, interval"] = _interval(means[:, column], 5)
        row[f"regret at {spent}, 90th percentile"] = round(float(np.quantile(there, 0.9)), 5)
    reached = [equivalents_to(mean, NEAR) for mean in means]
    row["equivalents to .01"] = _finite(equivalents_to(regrets.mean(axis=0), NEAR))
    row["equivalents to .01, interval"] = _interval(np.array(reached), 2)
    row["finished trials"] = round(statistics.fmean(study.finished for study in found), 1)
    row["kills"] = kills
    row["share of kills that are wrong"] = _share(sum(study.wrong for study in found), kills)
    row["share of kills that are costly"] = _share(sum(study.costly for study in found), kills)
    return row


def resampled(regrets: NDArray[np.float64], draws: int = 1000) -> NDArray[np.float64]:
    """Return mean curves of bootstrap samples of the studies."""
    random = np.random.default_rng(0)
    count = len(regrets)
    return np.array([regrets[random.integers(0, count, count)].mean(axis=0) for _ in range(draws)])


def _interval(values: NDArray[np.float64], digits: int) -> list[float | None]:
    # of sorted values, because quantiles between a number and infinity are no numbers
    ordered = np.sort(values)
    last = len(ordered) - 1
    ends = ordered[[int(0.025 * last), math.ceil(0.975 * last)]]
    return [_finite(round(float(end), digits)) for end in ends]


def _finite(value: float) -> float | None:
    """Return a number, or None for one that was not reached."""
    return value if math.isfinite(value) else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def _replay_seeds(task: PolicyTask, name: str, seeds: Sequence[int]) -> list[StudyFigures]:
    return [replay(task, name, seed) for seed in seeds]


def replay_all(
    task: PolicyTask, names: Iterable[str], most: int, pool: ProcessPoolExecutor
) -> dict[str, Any]:
    """Return the table of policies on a task."""
    rows: dict[str, Any] = {}
    for name in names:
        began = time.monotonic()
        seeds = range(min(most, POLICIES[name].studies))
        chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
        tasks = [pool.submit(_replay_seeds, task, name, chunk) for chunk in chunks]
        found = [figures for each in tasks for figures in each.result()]
        rows[name] = {
            **summarise(found, task.budget),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(in_words(name, rows[name]), flush=True)
    if YARDSTICK in rows:
        for row in rows.values():
            row["equivalents of TPE over its own"] = _ratio(rows[YARDSTICK], row)
    return rows


def _ratio(yardstick: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Return how many times fewer equivalents than the yardstick a policy needs, if both get there."""
    theirs, own = yardstick["equivalents to .01"], row["equivalents to .01"]
    return None if theirs is None or own is None else round(theirs / own, 2)


def in_words(name: str, row: Mapping[str, Any]) -> str:
    """Return a line of the table for people."""
    low, high = row["regret at 12, interval"]
    means = ", ".join(
        f"{at} {row[f'regret at {at}']:.4f}" for at in REPORTED_AT if f"regret at {at}" in row
    )
    costly = row["share of kills that are costly"]
    kills = "" if costly is None else f", costly kills {costly:.1%}"
    return (
        f"{name:40} regret at {means}, interval at 12 [{low:.4f}, {high:.4f}], "
        f"to .01 {row['equivalents to .01'] or 'not reached'}{kills}"
    )


def replay_tinker(most: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Return the mean regret over models of policies that need no look."""
    tasks = tinker_tasks()
    each = max(1, most // 20)
    rows: dict[str, Any] = {}
    for name in FINAL_VALUES:
        jobs = [pool.submit(_replay_seeds, task, name, range(each)) for task in tasks.values()]
        found = [figures for job in jobs for figures in job.result()]
        rows[name] = summarise(found, TINKER_BUDGET)
        print(in_words(name, rows[name]), flush=True)
    return {"models": len(tasks), "studies a model": each, "policies": rows}


def main() -> None:
    """Replay policies on the exported banks and on the table of final values."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("banks", nargs="*", help=f"of {', '.join(BANKS)} and tinker (default: all)")
    parser.add_argument("--studies", type=int, default=STUDIES, help="studies of a policy at most")
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="only this one")
    arguments = parser.parse_args()
    there = [name for name in BANKS if has_bank(name)]
    wanted = arguments.banks or [*there, "tinker"]
    if missing := set(wanted) - {*there, "tinker"}:
        raise SystemExit(f"no such bank yet: {', '.join(missing)} (benchmarks/curves/README.md)")
    # each process has one core: Gaussian processes of a few dozen points gain nothing from more
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures: dict[str, Any] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name in wanted:
            print(f"== {name}", flush=True)
            if name == "tinker":
                figures[name] = replay_tinker(arguments.studies, pool)
                continue
            task, about = bank_task(name)
            names = arguments.policy or POLICIES
            figures[name] = {**about, "policies": replay_all(task, names, arguments.studies, pool)}
    if not arguments.banks and not arguments.policy and arguments.studies == STUDIES:
        record("policies", {"yardstick": YARDSTICK, "frozen": FROZEN, **figures})


if __name__ == "__main__":
    main()
