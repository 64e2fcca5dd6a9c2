"""The gain from each doubling of LoRA's rank, and the smallest rank that is as good as the best.

Each rank is represented by its best finished trial over all other settings. The best learning rate
depends on the rank, so a comparison at one common rate would be unfair.
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
    """One rank: its best trial, and its gain over the next smaller rank."""

    r: int
    trial: int
    """Number of the best finished trial at this rank."""
    value: float
    trials: int
    """Finished trials at this rank. The best of many is better than the best of one by luck alone."""
    trainable: float | None
    seconds: float | None
    gain: float | None = None
    """Improvement over the next smaller rank. Negative if the larger rank is worse."""
    per_doubling: float | None = None
    """Gain per doubling of the rank."""
    per_million_parameters: float | None = None
    """Gain per million added trainable parameters. None if none were added."""
    per_second: float | None = None
    """Gain per added second of a trial. None if it took no longer."""


@dataclass(frozen=True)
class RankLadder:
    """An arm's ranks in ascending order."""

    arm: str
    objective: Objective
    rungs: tuple[RankStep, ...]
    noise: float | None
    """Standard deviation over seeds of the best configuration. None with a single seed."""

    @property
    def unit(self) -> str:
        """Unit of the gains: the metric's unit, or the metric itself."""
        return self.objective.unit or metric_words(self.objective.metric)

    @property
    def best(self) -> RankStep:
        """The rank with the best value, or the smaller of two equal ones."""
        # Of two equal ranks the smaller one is cheaper.
        return min(self.rungs, key=lambda rung: (self.objective.order(rung.value), rung.r))

    @property
    def enough(self) -> RankStep | None:
        """The smallest rank within the noise of the best. None if the noise is unknown."""
        if self.noise is None:
            return None
        best, noise = self.best.value, self.noise
        return next(
            rung for rung in self.rungs if self.objective.gain(best, over=rung.value) <= noise
        )

    @property
    def words(self) -> str:
        """The gains and the recommended rank as sentences."""
        steps = " → ".join(str(rung.r) for rung in self.rungs)
        gains = ", ".join(
            f"{rung.per_doubling:+.4f} at r={rung.r}"
            for rung in self.rungs
            if rung.per_doubling is not None
        )
        text = f"Ranks {steps}: gain per doubling in {self.unit}: {gains}{self._trend()}. "
        return text + self._recommendation()

    def _trend(self) -> str:
        """Return text on diminishing returns up to the best rank, and on the lack of gains beyond it."""
        gains = [rung.per_doubling for rung in self.rungs if rung.per_doubling is not None]
        # Past the best rank there are no gains that could diminish.
        climbing = gains[: self.rungs.index(self.best)]
        falling = all(after < before for before, after in itertools.pairwise(climbing))
        words = ", with diminishing returns" if len(climbing) > 1 and falling else ""
        return words if self.best == self.rungs[-1] else f"{words}, none beyond r={self.best.r}"

    def _recommendation(self) -> str:
        if self.noise is None or self.enough is None:
            return (
                f"The best {metric_words(self.objective.metric)} is at r={self.best.r}. How much of "
                "that is chance is unknown until a configuration is trained with several seeds."
            )
        if self.enough == self.best:
            return f"No smaller rank comes within the noise ({self.noise:.4f}) of r={self.best.r}."
        return (
            f"r={self.enough.r} is the smallest rank within the noise ({self.noise:.4f}) of the "
            f"best, r={self.best.r}."
        )


def rank_ladders(results: StudyResults) -> list[RankLadder]:
    """Return a ladder for every arm with finished trials of at least two ranks."""
    ladders = (rank_ladder(arm, _noise(results, arm.name)) for arm in results.arms)
    return [ladder for ladder in ladders if ladder is not None]


def rank_ladder(arm: ArmResult, noise: float | None) -> RankLadder | None:
    """Return an arm's ranks, or None if fewer than two ranks have a finished trial.

    The result is also None if adapter.trainable_parameters sets the rank: the rank then follows from the
    target modules, and a larger one adds no parameters.

    Args:
        arm: the arm with its trials.
        noise: standard deviation of the objective over seeds, or None.
    """
    # With a fixed number of parameters a larger rank means fewer target modules.
    if equal_size(arm):
        return None
    # Pruned trials did not see the end of their schedule and are left out.
    found: dict[int, list[TrialResult]] = {}
    for trial in arm.trials:
        rank = trial.params.get(RANK)
        if isinstance(rank, int | float) and trial.complete and trial.value is not None:
            found.setdefault(int(rank), []).append(trial)
    rungs: list[RankStep] = []
    for rank in sorted(found):
        below = rungs[-1] if rungs else None
        rungs.append(_rung(rank, found[rank], below, arm.objective))
    return RankLadder(arm.name, arm.objective, tuple(rungs), noise) if len(rungs) > 1 else None


def rank_sheet(ladder: RankLadder) -> TextTable:
    """Return the ladder as a table."""
    columns = (
        *("r", "trials", metric_words(ladder.objective.metric), "trainable", "time/trial"),
        *("gain", "per doubling"),
        *("per doubling / noise", "per 1M parameters", "per second"),
    )
    rows = [_row(rung, ladder.noise) for rung in ladder.rungs]
    return TextTable(f"{ladder.arm}: gain by rank", columns, tuple(rows))


def _noise(results: StudyResults, name: str) -> float | None:
    # Seeds are only repeated for finalists, so the noise is known only for compared arms.
    for found in results.decisive:
        if found.arm == name:
            return found.noise[0]
        if found.reference == name:
            return found.noise[1]
    return None


def _rung(
    rank: int, trials: Sequence[TrialResult], below: RankStep | None, objective: Objective
) -> RankStep:
    best = trials[0]  # trials of an arm are sorted with the best first
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
    """Return the gain per added unit, or None if nothing was added."""
    # A larger rank on fewer modules may add no parameters.
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
