"""Compare the training times of two arms, where the times can be compared at all.

Arms begin one after the other, so a machine whose load changes gives one of them the quiet hours.
The winners' fresh seeds alternate between the arms, and each pair of them meets the same load. On CPUs,
seconds of CPU time are compared, which the load of other programs changes little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sweeper.core.outcome import Outcome
from sweeper.reporting.intervals import LEVEL, IntervalEstimate, t_quantile
from sweeper.reporting.results import ArmResult

CPU_SECONDS, WALL_SECONDS = "cost/cpu_seconds", "cost/seconds"


def on_cpu(arm: ArmResult) -> bool:
    """Return True if the arm was trained on CPUs."""
    return arm.facts.repeatable


def time_ratio(arm: ArmResult, reference: ArmResult) -> IntervalEstimate | None:
    """Return the time of a training over the reference's, or None if it may be one.

    The ratio is a geometric mean with its 95 % interval. It is None unless the interval excludes one: a
    ratio within its own spread says nothing. Without alternating trainings only CPUs have a ratio.
    """
    if arm.adopted is not None or reference.adopted is not None:
        # Their trainings ran at another time, perhaps on another machine.
        return None
    metric = CPU_SECONDS if on_cpu(arm) and on_cpu(reference) else WALL_SECONDS
    pairs = _pairs(arm, reference, metric)
    if len(pairs) > 1:
        return _told(*_paired(pairs))
    if metric == WALL_SECONDS:
        return None
    own, other = (_logs(each, metric) for each in (arm, reference))
    return _told(*_apart(own, other)) if min(len(own), len(other)) > 1 else None


def _pairs(arm: ArmResult, reference: ArmResult, metric: str) -> list[float]:
    """Return the logarithms of the ratios of fresh seeds that were trained one after the other."""
    if arm.final is None or reference.final is None:
        return []
    # a seed that the other arm did not train has no partner
    both = zip(arm.final.judged, reference.final.judged, strict=False)
    times = [(_seconds(one.outcome, metric), _seconds(two.outcome, metric)) for one, two in both]
    return [math.log(one / two) for one, two in times if one and two]


def _seconds(outcome: Outcome | None, metric: str) -> float | None:
    # A training that failed or was stopped did not take a training's time.
    whole = outcome is not None and outcome.cause == "finished"
    return outcome.metrics.get(metric) if outcome is not None and whole else None


def _logs(arm: ArmResult, metric: str) -> list[float]:
    """Return the logarithms of the times of the arm's finished trials."""
    times = (_seconds(trial.outcome, metric) for trial in arm.trials)
    return [math.log(seconds) for seconds in times if seconds]


def _paired(pairs: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, its standard error and their degrees of freedom, of paired ratios."""
    return float(np.mean(pairs)), float(np.std(pairs, ddof=1)) / len(pairs) ** 0.5, len(pairs) - 1


def _apart(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the same for times that do not belong together, with Welch's degrees of freedom."""
    parts = [(float(np.var(found, ddof=1)) / len(found), len(found) - 1) for found in (own, other)]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / spread if spread else float(sum(nu for _, nu in parts))
    return float(np.mean(own) - np.mean(other)), variance**0.5, freedom


def _told(mean: float, error: float, freedom: float) -> IntervalEstimate | None:
    half = error * t_quantile((1 + LEVEL) / 2, freedom)
    if abs(mean) <= half:
        return None
    ends = (mean, mean - half, mean + half)
    value, low, high = (math.exp(each) for each in ends)
    return IntervalEstimate(value=value, low=low, high=high)
