"""Replay search policies on the bank of curves: what each is worth, in seconds instead of days.

    python -m benchmarks.policies                          # on every exported bank; policies.json
    python -m benchmarks.policies embedded --studies 20    # on one bank, without writing
    python -m benchmarks.policies tinker                   # final values of 35 models

A policy is a command line of the product: sampler, pruner, known points and stop rules are the product's
own (curves/replayed_study.py). Only a stop by a fixed gap in nats and halving with pausing are not: the
product does not have them. Each policy runs many simulated studies, every one with another seed of the
sampler, until a budget of trial-equivalents is spent: one training and one whole judgement each. A trial
or a kill that ends beyond the budget does not count.

The regret is that of the trial which looks best to the study: what its point is worth on the surface
that is fitted to the bank (curves/fitted_surface.py), minus the best worth of any point. Intervals are
95 % bootstrap over studies. Figures belong to the base and data of their bank, costs to its machine.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna

from benchmarks.curves.bank_points import RANK, RATE, RATIO, TARGETS, WARMUP
from benchmarks.curves.curve_bank import HERE, has_bank, read_bank
from benchmarks.curves.fitted_surface import FittedSurface, fit_surface
from benchmarks.curves.replayed_study import (
    CurveTable,
    EndedTrial,
    GapGuard,
    GuardMaker,
    RecordedCurve,
    ReplayedStudy,
    product_guard,
    recorded_curves,
    run_halving,
    run_in_turn,
)
from benchmarks.record import record
from sweeper.config.study_settings import PrunerSettings, SamplerName
from sweeper.core.outcome import SELF_ENDED
from sweeper.search.study_plan import StudyPlan, studies

BANKS = ("embedded", "base", "chat")
STUDIES = 200
GP_STUDIES = 60
"""Studies of policies whose sampler takes seconds a trial."""
BUDGET = 36.0
"""Trial-equivalents of a study."""
TINKER_BUDGET = 12.0
"""Trials of a study on a table of final values, which has 4 to 20 cells a model."""
GRID = np.arange(1.0, BUDGET + 0.01, 0.25)
REPORTED_AT = (2, 6, 12, 24)
NEAR = 0.01
"""Regret in nats that a policy is timed to."""
TINKER_TABLE = HERE / "tinker_sft_sweep.csv"
CHUNK = 10
"""Studies of one task of a process."""
COMMON = (
    *("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full", "finalists=none", "tracking=none"),
    *("data=tiny", "evaluation=tiny", "training=tiny", "space=tiny"),
)


@dataclass(frozen=True)
class SearchPolicy:
    """A way to search, as the product's command line says it."""

    overrides: tuple[str, ...]
    run: Callable[[ReplayedStudy, float], None] = run_in_turn
    gap: float | None = None
    """Nats behind the best look at 25 % at which a trial is stopped. None: the pruner decides."""
    known: bool = False
    """True if the product's default point comes first."""
    studies: int = STUDIES

    @property
    def sampler(self) -> str:
        """Name of the sampler."""
        return self.overrides[0].removeprefix("sampler=")


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
FINAL_VALUES = (
    *("random", "TPE", "Optuna's GP", "lora"),
    *("TPE after the known point", "lora after the known point"),
)
"""Policies that need no look, for tables of final values."""


@dataclass(frozen=True)
class PolicyTask:
    """A table of curves with its true values, and how a policy searches it."""

    table: CurveTable
    worth: np.ndarray
    """True value of each curve's point, in nats per token."""
    space: tuple[str, ...]
    """Overrides that make the product's space that of the table."""
    known: str
    """The known point, as an override's mapping."""
    budget: float = BUDGET
    """Trial-equivalents of a study."""


@dataclass(frozen=True)
class StudyFigures:
    """What one simulated study did within its budget."""

    regrets: np.ndarray
    """Regret of the best-looking trial at each of GRID."""
    kills: int
    wrong: int
    """Kills of trials that would have ended better than the median of those that ended."""
    costly: int
    """Kills of trials that would have ended better than the best of those that ended."""
    finished: int


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
    repeated = name == "embedded" and has_bank("seeds", folder)
    fresh = fresh_means(table.curves, folder) if repeated else {}
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
        "surface, error of the best half": round(surface.error_of_best_half, 4),
        "surface, error between its points": _of_better_half(between, surface),
        "points within .01 of the best": int((worth <= worth.min() + NEAR).sum()),
    }
    ratio = min(table.levels()[RATIO], key=lambda value: abs(math.log(value / 2)))
    known = f"{{{RATE}: 5e-3, {RANK}: 8, {RATIO}: {ratio}, {TARGETS}: all-linear}}"
    return PolicyTask(table, worth, space_of(table), known), figures


def _of_better_half(between: Sequence[Mapping[str, Any]], surface: FittedSurface) -> float | None:
    """Return the root mean square error at the better half of points that are not in the surface."""
    if not between:
        return None
    better = sorted(between, key=lambda trial: float(trial["value"]))[: -(-len(between) // 2)]
    values = np.array([trial["value"] for trial in better])
    predicted = surface.at_points([trial["point"] for trial in better])
    return round(float(np.sqrt(np.mean((predicted - values) ** 2))), 4)


def fresh_means(curves: Sequence[RecordedCurve], folder: Path = HERE) -> dict[int, float]:
    """Return the mean value over further seeds of each curve that has any, by its index."""
    header, trials = read_bank("seeds", folder)
    found: dict[int, list[float]] = {}
    index_of = {_key(curve.point): index for index, curve in enumerate(curves)}
    for curve in recorded_curves(header, trials):
        index = index_of.get(_key(curve.point))
        if index is not None and math.isfinite(curve.value()):
            found.setdefault(index, []).append(curve.value())
    return {index: statistics.fmean(values) for index, values in found.items()}


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))


@cache
def plan_of(words: tuple[str, ...]) -> StudyPlan:
    """Return the product's plan of a command line."""
    (plan,) = studies(words)
    return plan


def guard_of(policy: SearchPolicy) -> GuardMaker:
    """Return what makes the guards of a policy's trials."""
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


def regrets_of(finished: Sequence[EndedTrial], worth: np.ndarray) -> np.ndarray:
    """Return the regret of the trial that looks best at each of GRID.

    Before the first trial has ended, the regret is that of the median point, as of a guess.
    """
    regrets = np.full(len(GRID), float(np.median(worth) - worth.min()))
    best = math.inf
    for trial in finished:
        if trial.value < best:
            best = trial.value
            regrets[GRID >= trial.spent] = worth[trial.index] - worth.min()
    return regrets


def equivalents_to(regrets: np.ndarray, wanted: float) -> float:
    """Return the trial-equivalents at which a mean regret is first reached, or infinity."""
    reached = np.flatnonzero(np.minimum.accumulate(regrets) <= wanted)
    return float(GRID[reached[0]]) if len(reached) else math.inf


def summarise(found: Sequence[StudyFigures]) -> dict[str, Any]:
    """Return the figures of a policy over its studies."""
    regrets = np.array([study.regrets for study in found])
    means = resampled(regrets)
    kills = sum(study.kills for study in found)
    row: dict[str, Any] = {"studies": len(found)}
    for budget in REPORTED_AT:
        column = int(np.searchsorted(GRID, budget))
        there = regrets[:, column]
        row[f"regret at {budget}"] = round(float(there.mean()), 5)
        row[f"regret at {budget}, interval"] = _interval(means[:, column], 5)
        row[f"regret at {budget}, 90th percentile"] = round(float(np.quantile(there, 0.9)), 5)
    reached = [equivalents_to(mean, NEAR) for mean in means]
    row["equivalents to .01"] = _finite(equivalents_to(regrets.mean(axis=0), NEAR))
    row["equivalents to .01, interval"] = _interval(np.array(reached), 2)
    row["finished trials"] = round(statistics.fmean(study.finished for study in found), 1)
    row["kills"] = kills
    row["share of kills that are wrong"] = _share(sum(study.wrong for study in found), kills)
    row["share of kills that are costly"] = _share(sum(study.costly for study in found), kills)
    return row


def resampled(regrets: np.ndarray, draws: int = 1000) -> np.ndarray:
    """Return mean curves of bootstrap samples of the studies."""
    random = np.random.default_rng(0)
    count = len(regrets)
    return np.array([regrets[random.integers(0, count, count)].mean(axis=0) for _ in range(draws)])


def _interval(values: np.ndarray, digits: int) -> list[float | None]:
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
        rows[name] = {**summarise(found), "seconds": round(time.monotonic() - began, 1)}
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
    costly = row["share of kills that are costly"]
    kills = "" if costly is None else f", costly kills {costly:.1%}"
    return (
        f"{name:40} regret at 6 {row['regret at 6']:.4f}, at 12 {row['regret at 12']:.4f} "
        f"[{low:.4f}, {high:.4f}], at 24 {row['regret at 24']:.4f}, "
        f"to .01 {row['equivalents to .01'] or 'not reached'}{kills}"
    )


def available(names: Iterable[str]) -> list[str]:
    """Return the policies whose sampler and pruner this version has, and name the others."""
    samplers = {*get_args(SamplerName), "optuna"}
    pruners = set(get_args(PrunerSettings.model_fields["name"].annotation))
    there: list[str] = []
    for name in names:
        sampler, pruner = POLICIES[name].parts
        if sampler in samplers and pruner in pruners:
            there.append(name)
        else:
            print(f"{name}: left out, because this version lacks {sampler=} or {pruner=}")
    return there


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


def replay_tinker(most: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Return the mean regret over models of policies that need no look."""
    tasks = tinker_tasks()
    each = max(1, most // 20)
    rows: dict[str, Any] = {}
    for name in available(FINAL_VALUES):
        jobs = [pool.submit(_replay_seeds, task, name, range(each)) for task in tasks.values()]
        found = [figures for job in jobs for figures in job.result()]
        rows[name] = summarise(found)
        print(in_words(name, rows[name]), flush=True)
    return {"models": len(tasks), "studies a model": each, "policies": rows}


def main() -> None:
    """Replay policies on the banks that there are."""
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
            names = available(arguments.policy or POLICIES)
            figures[name] = {**about, "policies": replay_all(task, names, arguments.studies, pool)}
    if not arguments.banks and not arguments.policy and arguments.studies == STUDIES:
        record("policies", {"yardstick": YARDSTICK, **figures})


if __name__ == "__main__":
    main()
