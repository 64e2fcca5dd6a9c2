"""Reasons why a verdict is PROVISIONAL, each with the command that removes it.

A search that was too small for an arm decides the comparison before it begins. The module also names the
settings whose best value lies at an end of what was offered.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from sweeper.reporting.baseline_doubts import OUTER, RATE, baseline_doubts, place_in_range
from sweeper.reporting.results import ArmResult, SearchedRange, StudyResults
from sweeper.reporting.study_progress import format_scalar
from sweeper.reporting.text_table import counted

FULL = "full fine-tuning"
HALF_DECADE = 10**0.5
"""Factor between two neighbouring learning rates of a widened choice."""
BEST_FEW = 5
"""Number of best trials that are looked at for a common end of a range."""
EDGES = ("adapter.r", "adapter.alpha_over_r", "adapter.lora_alpha", "training.warmup_ratio")
"""Settings whose ends are named. A setting at its end leaves the comparison fair, unlike a rate."""


@dataclass(frozen=True)
class VerdictDoubt:
    """A reason why the verdict is provisional, and the command that removes the reason."""

    arm: str
    reason: str
    command: str


@dataclass(frozen=True)
class RangeEdge:
    """A setting whose best value lies at an end of its range, and the command that looks beyond."""

    arm: str
    reason: str
    command: str


def doubts(results: StudyResults) -> list[VerdictDoubt]:
    """Return the reasons why another run could change the answer. Without a result there are none."""
    if all(arm.best is None for arm in results.arms):
        return []
    return [
        *_range_doubts(results),
        *_rate_doubts(results),
        *_budget_doubts(results),
        *_adoption_doubts(results),
    ]


def label(arm: ArmResult) -> str:
    """Return the arm's method, with its name or its adopted run if the method alone is ambiguous."""
    if arm.adopted is not None:
        return f"{arm.method} (run {arm.adopted.short})"
    return arm.method if arm.name in ("lora", "full") else f"{arm.method} ({arm.name})"


def with_override(command: str, key: str, value: str) -> str:
    """Return a command with one override set or replaced, before its final -m."""
    # The flag -m ends every study's command, so the override goes before it.
    words = [word for word in shlex.split(command) if not word.startswith(f"{key}=")]
    return shlex.join([*words[:-1], f"{key}={value}", words[-1]])


def renamed(results: StudyResults, suffix: str) -> str:
    """Return the study's command with a suffix on its name, for a search of other settings."""
    name = f"{results.study_name}_{suffix}"
    return with_override(results.command, "hydra.sweeper.study_name", name)


def searched_otherwise(
    results: StudyResults, arm: ArmResult, suffix: str, key: str, words: str
) -> str:
    """Return the command under a new name, with one key of an arm given or searched otherwise.

    A key of `training` that the arm does not search, or that every arm does, is set for every arm: with
    different schedules the arms would no longer be compared fairly. The learning rate is the exception,
    because each arm has its own.
    """
    command = renamed(results, suffix)
    shared = key not in arm.ranges or all(key in each.ranges for each in results.arms)
    for_all = key.startswith("training.") and shared and key != RATE
    if arm.name == "lora" or for_all:
        return with_override(command, key, words)
    return with_override(command, f"hydra.sweeper.arms.{arm.name}.params", f'{{{key}: "{words}"}}')


def reference_arm(results: StudyResults) -> ArmResult | None:
    """Return the full fine-tuning arm, else the second arm with a result, else None."""
    compared = [arm for arm in results.arms if arm.best is not None]
    # Adapters are usually measured by full fine-tuning.
    full = [arm for arm in compared if arm.method == FULL]
    return next(iter(full or compared[1:]), None)


def rates_tried(arm: ArmResult) -> list[float]:
    """Return the learning rates of the trials that ended by themselves or were pruned, ascending."""
    # A pruned trial was judged and lost, so its rate was tried. A failed one was not judged.
    judged = [trial for trial in arm.trials if trial.complete or trial.outcome.cause == "pruned"]
    found = (trial.params.get(RATE, arm.settings.get(RATE)) for trial in judged)
    return sorted({float(rate) for rate in found if isinstance(rate, int | float)})


def _range_doubts(results: StudyResults) -> Iterator[VerdictDoubt]:
    """Yield a doubt for each arm whose best learning rate is near an end of its range (log scale)."""
    for arm in results.arms:
        # Methods differ most in their best learning rate, so its range is checked.
        found = arm.ranges.get(RATE)
        if arm.best is None or found is None:
            continue
        rate = float(arm.setting(RATE))
        low, high = found.values[0], found.values[-1]
        place = place_in_range(rate, low, high)
        if OUTER <= place <= 1 - OUTER:
            continue
        reason = (
            f"the best learning rate of {label(arm)} ({rate:.3g}) is in the outer tenth of its search "
            f"range ({low:.3g} to {high:.3g}), so a better one may exist outside of it"
        )
        yield VerdictDoubt(arm.name, reason, _wider_rates(results, arm, place < OUTER))


def _rate_doubts(results: StudyResults) -> Iterator[VerdictDoubt]:
    """Yield a doubt for each compared arm whose learning rate was not searched, or hardly."""
    compared = [arm for arm in results.arms if arm.best is not None]
    # An arm alone is compared with its untuned base, which has no learning rate.
    if len(compared) < 2:
        return
    for arm in compared:
        if arm.adopted is not None:
            continue
        rates = rates_tried(arm)
        found = arm.ranges.get(RATE)
        if found is None:
            rate = arm.setting(RATE)
            words = "unknown" if rate is None else f"{float(rate):.3g} in every trial"
            reason = f"the learning rate of {label(arm)} was not searched ({words})"
            yield VerdictDoubt(arm.name, reason, _wider_rates(results, arm))
        elif _few(arm, rates, results.fairness.min_finished):
            reason = (
                f"{label(arm)} was tried with {counted(len(rates), 'learning rate')}, fewer than "
                f"fairness.min_finished={results.fairness.min_finished}"
            )
            yield VerdictDoubt(arm.name, reason, _wider_rates(results, arm))


def _few(arm: ArmResult, rates: list[float], wanted: int) -> bool:
    # An unfinished search is the doubt about its budget, whose command adds trials.
    return len(rates) < wanted and (arm.exhaustive or arm.finished >= wanted)


def _wider_rates(results: StudyResults, arm: ArmResult, downwards: bool | None = None) -> str:
    """Return the command that searches an arm's learning rate further. None is in both directions."""
    found = arm.ranges.get(RATE)
    if found is None:
        rate = float(arm.setting(RATE) or 1e-4)
        found = SearchedRange(values=(rate,), continuous=arm.name == "lora")
    words = wider(found, downwards)
    command = searched_otherwise(results, arm, "wider", RATE, words)
    # A grid is searched to its end, so it needs a trial for each of its values.
    if found.continuous or arm.name == "lora":
        return command
    count = max(arm.n_trials, words.count(",") + 1)
    return with_override(command, f"hydra.sweeper.arms.{arm.name}.n_trials", str(count))


def wider(found: SearchedRange, downwards: bool | None) -> str:
    """Return the search-space text for a range that reaches a decade further at one end, or at both."""
    low, high = found.values[0], found.values[-1]
    below, above = downwards is not False, downwards is not True
    # Sampled ranges grow by a decade. Grids get two more values, half a decade apart.
    if found.continuous:
        ends = (low / 10 if below else low, high * 10 if above else high)
        return f"tag(log, interval({ends[0]:.3g}, {ends[1]:.3g}))"
    more = [high * HALF_DECADE, high * 10] if above else []
    more += [low / 10, low / HALF_DECADE] if below else []
    values = sorted({float(f"{value:.3g}") for value in (*found.values, *more)})
    return f"choice({', '.join(f'{value:.3g}' for value in values)})"


def _budget_doubts(results: StudyResults) -> Iterator[VerdictDoubt]:
    """Yield a doubt for each arm with too few finished trials or too small a share of the budget."""
    rule = results.fairness
    # Adopted arms used no budget here. Their search is judged by the baseline's doubts.
    searched = [arm for arm in results.arms if arm.adopted is None]
    if not searched:
        return
    largest = max(searched, key=lambda arm: _spent(arm, rule.equal))
    for arm in searched:
        if arm.tried - arm.refined >= arm.n_trials and (arm.exhaustive or arm.best is None):
            # A completed grid has no further point, and an arm that only failed needs another space.
            # Whether the grid had enough learning rates is a doubt of its own.
            continue
        spent, most = _spent(arm, rule.equal), _spent(largest, rule.equal)
        if arm.finished < rule.min_finished:
            factor = rule.min_finished / max(arm.finished, 1)
            reason = (
                f"{label(arm)} has {counted(arm.finished, 'finished trial')}, fewer than "
                f"fairness.min_finished={rule.min_finished}"
            )
        elif spent < (1 - rule.tolerance) * most:
            factor = most / spent if spent else 2.0
            unit = rule.equal.replace("_", "-").removesuffix("s")
            reason = (
                f"{label(arm)} was searched with {counted(spent, unit)} and {label(largest)} with "
                f"{most:,.0f}, so the comparison favours the latter"
            )
        else:
            continue
        yield VerdictDoubt(arm.name, reason, _command_with_more_trials(results, arm, factor))


def _adoption_doubts(results: StudyResults) -> Iterator[VerdictDoubt]:
    """Yield the doubts about adopted models, with the command that trains a baseline in this study."""
    command = with_override(
        renamed(results, "own_baseline"), "hydra.sweeper.baseline.run_id", "null"
    )
    for arm in results.arms:
        if arm.best is not None:
            for reason in baseline_doubts(arm, results.fairness):
                yield VerdictDoubt(arm.name, f"{label(arm)} {reason}", command)


def _spent(arm: ArmResult, unit: str) -> float:
    # Points beside a grid make up for its steps, so a rival does not have to match them.
    trials = arm.tried - arm.refined
    return {"trials": trials, "tokens": arm.tokens, "device_seconds": arm.seconds}[unit]


def _command_with_more_trials(results: StudyResults, arm: ArmResult, factor: float) -> str:
    """Return the study's command with `factor` times the trials for an arm, at least one more."""
    count = max(math.ceil(arm.n_trials * factor), arm.n_trials + 1)
    if arm.tried < arm.n_trials:
        # Its own n_trials is not used up yet
        count = max(arm.n_trials, math.ceil(arm.tried * factor))
    where = "hydra.sweeper" if arm.name == "lora" else f"hydra.sweeper.arms.{arm.name}"
    return with_override(results.command, f"{where}.n_trials", str(count))


def range_edges(results: StudyResults) -> list[RangeEdge]:
    """Return the settings of each arm's winner that lie at an end of what was offered."""
    found = (_edge(results, arm, key) for arm in results.arms for key in EDGES)
    return [edge for edge in found if edge is not None]


def _edge(results: StudyResults, arm: ArmResult, key: str) -> RangeEdge | None:
    found = arm.ranges.get(key)
    value = None if arm.best is None else arm.best.params.get(key)
    if found is None or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    side = _end(found, value)
    if side is None:
        return None
    low, high = found.values[0], found.values[-1]
    at_end = "" if value in (low, high) else "near "
    name = key.rpartition(".")[2]
    reason = (
        f"the best trial of {label(arm)} has {name}={format_scalar(value)}, {at_end}the {side} offered "
        f"({low:g} to {high:g})"
    )
    best = [trial.params.get(key) for trial in arm.trials if trial.complete][:BEST_FEW]
    if len(best) == BEST_FEW and set(best) == {value}:
        reason += f", as all of its best {BEST_FEW} trials"
    words = _beyond(found, side == "lowest")
    return RangeEdge(arm.name, reason, searched_otherwise(results, arm, "beyond", key, words))


def _end(found: SearchedRange, value: float) -> str | None:
    """Return the end of a range that a value lies at, or None. At zero nothing lies beyond."""
    low, high = found.values[0], found.values[-1]
    margin = OUTER * (high - low) if found.continuous else 0.0
    if value <= low + margin and low > 0:
        return "lowest"
    return "highest" if value >= high - margin else None


def _beyond(found: SearchedRange, downwards: bool) -> str:
    """Return the search-space text for a range that reaches to half or to twice one of its ends."""
    low, high = found.values[0], found.values[-1]
    if found.continuous:
        ends = (low / 2, high) if downwards else (low, 2 * high)
        return f"interval({ends[0]:g}, {ends[1]:g})"
    more = low / 2 if downwards else 2 * high
    values = sorted({*found.values, more if more < 1 else float(round(more))})
    return f"choice({', '.join(f'{value:g}' for value in values)})"
