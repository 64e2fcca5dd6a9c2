"""Diminishing returns: what each doubling of LoRA's rank brings, and the smallest rank that will do.

For each rank the best finished trial over all other settings counts: the best learning rate depends on
the rank, so ranks at one common rate would be compared unfairly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sweeper.config.settings import Objective, metric_words
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult, equal_size
from sweeper.reporting.text_table import TextTable, duration, number

RANK = "adapter.r"


@dataclass(frozen=True)
class RankStep:
    """One rank: its best trial, and what it gains over the next smaller rank."""

    r: int
    trial: int
    """Number of the best finished trial at this rank."""
    value: float
    trials: int
    """Finished trials at this rank; the best of many is better than the best of one by luck alone."""
    trainable: float | None
    seconds: float | None
    gain: float | None = None
    """How much better than the next smaller rank; negative where the larger rank is worse."""
    per_doubling: float | None = None
    per_million_parameters: float | None = None
    """Gain over added trainable parameters; None where none were added."""
    per_second: float | None = None
    """Gain over added time of a trial; None where it took no longer."""


@dataclass(frozen=True)
class RankLadder:
    """An arm's ranks in ascending order."""

    arm: str
    objective: Objective
    rungs: tuple[RankStep, ...]
    noise: float | None
    """Standard deviation over seeds of the best configuration, if it was trained with several."""

    @property
    def unit(self) -> str:
        """What gains are measured in: the metric's unit, or the metric itself."""
        return self.objective.unit or metric_words(self.objective.metric)

    @property
    def best(self) -> RankStep:
        """The rank with the best value; the smaller of two that are equal."""
        return min(self.rungs, key=lambda rung: (self.objective.order(rung.value), rung.r))

    @property
    def enough(self) -> RankStep | None:
        """The smallest rank within the noise of the best; None while the noise is unknown."""
        if self.noise is None:
            return None
        best, noise = self.best.value, self.noise
        return next(
            rung for rung in self.rungs if self.objective.gain(best, over=rung.value) <= noise
        )

    @property
    def words(self) -> str:
        """The steps and the recommendation in words."""
        steps = " → ".join(str(rung.r) for rung in self.rungs)
        gains = ", ".join(
            f"{rung.r}: {rung.per_doubling:+.4f}"
            for rung in self.rungs
            if rung.per_doubling is not None
        )
        text = f"Ranks {steps}: gain per doubling in {self.unit} {gains}{self._trend()}. "
        return text + self._recommendation()

    def _trend(self) -> str:
        """What the gains up to the best rank do; past it there are none."""
        gains = [rung.per_doubling for rung in self.rungs if rung.per_doubling is not None]
        climbing = gains[: self.rungs.index(self.best)]
        falling = all(after < before for before, after in itertools.pairwise(climbing))
        words = ", with diminishing returns" if len(climbing) > 1 and falling else ""
        return words if self.best == self.rungs[-1] else f"{words}, none beyond r={self.best.r}"

    def _recommendation(self) -> str:
        if self.noise is None or self.enough is None:
            return (
                f"The best {metric_words(self.objective.metric)} is at r={self.best.r}; how much of "
                "that is chance is unknown until a configuration was trained with several seeds."
            )
        if self.enough == self.best:
            return f"No smaller rank comes within the noise ({self.noise:.4f}) of r={self.best.r}."
        return (
            f"r={self.enough.r} is the smallest rank within the noise ({self.noise:.4f}) of the "
            f"best, r={self.best.r}."
        )


def rank_ladders(results: StudyResults) -> list[RankLadder]:
    """One ladder for every arm with finished trials of several ranks."""
    ladders = (rank_ladder(arm, _noise(results, arm.name)) for arm in results.arms)
    return [ladder for ladder in ladders if ladder is not None]


def rank_ladder(arm: ArmResult, noise: float | None) -> RankLadder | None:
    """An arm's ranks; None where fewer than two ranks have a finished trial.

    Nor is there one where the rank follows from the number of trainable parameters: it then stands for
    the target modules, and a larger one brings no parameters.

    Args:
        arm: its trials.
        noise: standard deviation over seeds of the objective.
    """
    if equal_size(arm):
        return None
    found: dict[int, list[TrialResult]] = {}
    for trial in arm.trials:
        rank = trial.point.get(RANK)
        if isinstance(rank, int | float) and trial.complete and trial.value is not None:
            found.setdefault(int(rank), []).append(trial)
    rungs: list[RankStep] = []
    for rank in sorted(found):
        below = rungs[-1] if rungs else None
        rungs.append(_rung(rank, found[rank], below, arm.objective))
    return RankLadder(arm.name, arm.objective, tuple(rungs), noise) if len(rungs) > 1 else None


def rank_sheet(ladder: RankLadder) -> TextTable:
    """The ladder as a table."""
    columns = (
        *("r", "trials", metric_words(ladder.objective.metric), "trainable", "time/trial"),
        *("gain", "per doubling"),
        *("in noise", "per 1M parameters", "per second"),
    )
    rows = [_row(rung, ladder.noise) for rung in ladder.rungs]
    return TextTable(f"{ladder.arm}: what each rank brings", columns, tuple(rows))


def _noise(results: StudyResults, name: str) -> float | None:
    for found in results.decisive:
        if found.arm == name:
            return found.noise[0]
        if found.reference == name:
            return found.noise[1]
    return None


def _rung(
    rank: int, trials: Sequence[TrialResult], below: RankStep | None, objective: Objective
) -> RankStep:
    best = trials[0]  # an arm has its trials with the best first
    assert best.value is not None
    trainable, seconds = best.metric("parameters/trainable"), best.metric("cost/seconds")
    rung = RankStep(rank, best.number, best.value, len(trials), trainable, seconds)
    if below is None:
        return rung
    gain = objective.gain(best.value, over=below.value)
    return replace(
        rung,
        gain=gain,
        per_doubling=gain / math.log2(rank / below.r),
        per_million_parameters=_per(gain, trainable, below.trainable, 1e6),
        per_second=_per(gain, seconds, below.seconds, 1.0),
    )


def _per(gain: float, above: float | None, below: float | None, unit: float) -> float | None:
    """Gain over what was added; nothing is to be divided by where nothing was added."""
    if above is None or below is None or above <= below:
        return None
    return gain / (above - below) * unit


def _row(rung: RankStep, noise: float | None) -> tuple[str, ...]:
    in_noise = None if noise is None or rung.per_doubling is None else rung.per_doubling / noise
    return (
        str(rung.r),
        str(rung.trials),
        f"{rung.value:.4f}",
        number(rung.trainable),
        duration(rung.seconds),
        number(rung.gain, "{:+.4f}"),
        number(rung.per_doubling, "{:+.4f}"),
        number(in_noise, "{:+.1f}×"),
        number(rung.per_million_parameters, "{:+.3g}"),
        number(rung.per_second, "{:+.2g}"),
    )
