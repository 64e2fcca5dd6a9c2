"""Compare LoRA's ranks with the other searched numbers allowed for.

A search tries its ranks at different learning rates and unequally often, so the best trial of a rank is
no fair measure of the rank. A linear model of all alike trials separates the rank's part from the other
numbers': each rank has its own level, the logarithm of the learning rate enters with its square, and any
other number enters as it is. What the model does not explain, a seed's chance included, is its error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sweeper.config.settings import Objective
from sweeper.reporting.baseline_doubts import RATE
from sweeper.reporting.intervals import LEVEL, IntervalEstimate, t_quantile
from sweeper.reporting.results import TrialResult
from sweeper.reporting.verdict_words import perplexity_words, with_interval

RANK = "adapter.r"
FEWEST_FREEDOM = 3
"""Degrees of freedom of the model's error below which nothing is said. Its estimate would be a guess."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RankLead:
    """A rank that another one surpasses beyond chance."""

    better: int
    worse: int
    gain: IntervalEstimate
    """How much better, in the metric's unit. The intervals of all pairs of ranks hold together."""

    def words(self, objective: Objective) -> str:
        """Return the difference with its interval, of losses also as a factor in perplexity."""
        unit, factor = f" {objective.unit}".rstrip(), perplexity_words(self.gain.value, objective)
        return with_interval(self.gain, "{:.4f}", unit, factor)


@dataclass(frozen=True)
class RankEffects:
    """The differences between the ranks of an arm that its trials show."""

    leads: tuple[RankLead, ...]
    allowed_for: tuple[str, ...]
    """Settings besides the rank that differ between the trials, by key."""
    trials: int
    sufficient: bool
    """True if there are enough trials for a statement, and the rank varies apart from other numbers."""


def rank_effects(trials: Sequence[TrialResult], objective: Objective) -> RankEffects:
    """Return which ranks are better than others, over trials that differ in numbers only.

    Args:
        trials: complete trials with a value and the same choices.
        objective: the direction of the values.
    """
    varied = _varied(trials)
    values = np.array([objective.gain(trial.value or 0.0, over=0.0) for trial in trials])
    ranks = sorted({_number(trial, RANK) for trial in trials})
    columns = [[float(_number(trial, RANK) == rank) for trial in trials] for rank in ranks]
    for key in varied:
        columns += _entered(key, [_number(trial, key) for trial in trials])
    design = np.array(columns, dtype=np.float64).T
    freedom = len(trials) - design.shape[1]
    whole = all(_is_number(trial, key) for trial in trials for key in varied)
    # A setting that never varies apart from the rank cannot be told from it.
    sufficient = whole and freedom >= FEWEST_FREEDOM and _is_regular(design)
    pairs = [
        (one, two)
        for one, two in itertools.combinations(range(len(ranks)), 2)
        if all(_overlap(trials, key, ranks[one], ranks[two]) for key in varied)
    ]
    leads = tuple(_leads(design, values, ranks, pairs)) if sufficient and pairs else ()
    return RankEffects(leads, tuple(varied), len(trials), sufficient)


def _entered(key: str, numbers: Sequence[float]) -> list[list[float]]:
    """Return the columns of the design in which the numbers of one setting enter."""
    if key != RATE:
        return [_centred(numbers)]
    logs = _centred([math.log(number) for number in numbers])
    # The loss has its optimum inside of the searched rates, so a straight line would not fit. Of two
    # rates the square is no further number.
    return [logs, [log**2 for log in logs]] if len(set(numbers)) > 2 else [logs]


def _is_regular(design: Floats) -> bool:
    return bool(np.linalg.matrix_rank(design) == design.shape[1])


def _overlap(trials: Sequence[TrialResult], key: str, one: float, two: float) -> bool:
    """Return True if each of two ranks has a trial between the other's smallest and largest number."""
    # Between ranks that were tried at different rates, the model would only extrapolate.
    found = [
        [_number(trial, key) for trial in trials if _number(trial, RANK) == rank]
        for rank in (one, two)
    ]
    return all(
        any(min(own) <= number <= max(own) for number in other)
        for own, other in (found, reversed(found))
    )


def _leads(
    design: Floats, values: Floats, ranks: Sequence[float], pairs: Sequence[tuple[int, int]]
) -> list[RankLead]:
    """Return the pairs of ranks whose levels differ beyond chance, after Bonferroni over the pairs."""
    inverse = np.linalg.inv(design.T @ design)
    levels = inverse @ design.T @ values
    freedom = len(values) - design.shape[1]
    variance = float(((values - design @ levels) ** 2).sum()) / freedom
    reach = t_quantile(1 - (1 - LEVEL) / 2 / len(pairs), freedom)
    leads = []
    for one, two in pairs:
        better, worse = (one, two) if levels[one] > levels[two] else (two, one)
        gain = float(levels[better] - levels[worse])
        # Var(a − b) = Var(a) + Var(b) − 2 Cov(a, b), as a multiple of the error's variance.
        of_pair = inverse[one, one] + inverse[two, two] - 2 * inverse[one, two]
        half = reach * float(of_pair * variance) ** 0.5
        if gain > half:
            found = IntervalEstimate(value=gain, low=gain - half, high=gain + half)
            leads.append(RankLead(int(ranks[better]), int(ranks[worse]), found))
    return leads


def _varied(trials: Sequence[TrialResult]) -> list[str]:
    """Return the numeric settings besides the rank that differ between trials, or that some lack."""
    keys = dict.fromkeys(key for trial in trials for key in trial.params if key != RANK)
    numeric = [key for key in keys if any(_is_number(trial, key) for trial in trials)]
    return [key for key in numeric if len({trial.params.get(key) for trial in trials}) > 1]


def _is_number(trial: TrialResult, key: str) -> bool:
    value = trial.params.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(trial: TrialResult, key: str) -> float:
    value = trial.params.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _centred(numbers: Sequence[float]) -> list[float]:
    """Return numbers around zero with a spread of one, so that a design of them is well conditioned."""
    found = np.array(numbers)
    centred: list[float] = ((found - found.mean()) / found.std()).tolist()
    return centred
