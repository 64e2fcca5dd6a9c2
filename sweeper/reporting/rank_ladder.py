"""Compute the gain from each doubling of LoRA's rank, over trials that differ in numbers only.

Each rank is represented by its best finished trial over the numeric settings. The best learning rate
depends on the rank, so a comparison at one common rate would be unfair. A rank that was tried with other
target modules only, or with another choice that is no number, is left out: its gain would be theirs. The
gains describe the trials. That a rank is better is said only where sweeper.reporting.rank_effects
shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sweeper.config.settings import Objective, metric_words
from sweeper.config.space import Scalar
from sweeper.reporting.intervals import LEVEL, t_quantile
from sweeper.reporting.rank_effects import RANK, RankEffects, rank_effects
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult, equal_size
from sweeper.reporting.study_progress import short_names
from sweeper.reporting.text_table import TextTable, counted, duration, number, perplexity_factor

MOST_STEPS = 8
"""Ranks up to which the sentences name each gain. Of more, only the table does."""
MOST_LEADS = 6
"""Pairs of ranks that the sentences name. Forty of them are not read."""


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
    effects: RankEffects
    """What all trials of the ladder show about its ranks, with the other numbers allowed for."""
    freedom: int = 0
    """Degrees of freedom of the noise."""
    like: tuple[str, ...] = ()
    """Choices that all of its trials share, as name=value."""
    left_out: tuple[int, ...] = ()
    """Ranks whose finished trials all have other choices."""

    @property
    def unit(self) -> str:
        """Unit of the gains: the metric's unit, or the metric itself."""
        return self.objective.unit or metric_words(self.objective.metric)

    @property
    def chance(self) -> float | None:
        """The largest difference of two trials of one seed each that may be chance (95 %)."""
        if self.noise is None or not self.freedom:
            return None
        # The difference of two values has twice the variance of one.
        return t_quantile((1 + LEVEL) / 2, self.freedom) * 2**0.5 * self.noise

    @property
    def words(self) -> str:
        """The gains, and what they show, as sentences."""
        like = f" with {', '.join(self.like)}" if self.like else ""
        text = f"Ranks {self._gains(like)}. {self._findings()}"
        if not self.left_out:
            return text
        ranks = ", ".join(f"r={rank}" for rank in self.left_out)
        return f"{text} Not compared, because it was tried with other choices only: {ranks}."

    def _gains(self, like: str) -> str:
        """Return the ranks and their gains, or only how many ranks there are if they are many."""
        ranks = [str(rung.r) for rung in self.rungs]
        if len(ranks) > MOST_STEPS:
            return f"{ranks[0]} to {ranks[-1]}{like}: {len(ranks)} were tried"
        gains = ", ".join(
            f"{rung.per_doubling:+.4f} at r={rung.r}{self._factor(rung.per_doubling)}"
            for rung in self.rungs
            if rung.per_doubling is not None
        )
        return f"{' → '.join(ranks)}{like}: gain per doubling in {self.unit}: {gains}"

    def _findings(self) -> str:
        chance = self.chance
        if chance is None:
            told = (
                "How much of a gain is chance is unknown until a configuration has several seeds."
            )
        else:
            told = (
                "Between trials of one seed each, a difference below "
                f"{chance:.4f}{self._factor(chance)} may be chance (95 %)."
            )
        return f"{told} {self._comparison()}"

    def _factor(self, difference: float) -> str:
        """Return a difference as a factor in perplexity in brackets, or '' if it is none of losses."""
        in_nats = self.objective.unit == "nats"
        return f" ({perplexity_factor(difference)})" if in_nats else ""

    def _comparison(self) -> str:
        """Return which ranks are better than others, with intervals, or that none is shown to be."""
        found = self.effects
        names = [key.rpartition(".")[2] for key in found.allowed_for]
        allowed = f" with {', '.join(names)} allowed for" if names else ""
        none = "no rank is shown to be better than another, or to be enough"
        if not found.sufficient:
            trials = counted(found.trials, "trial")
            return f"{trials} are too few or too alike to compare ranks{allowed}: {none}."
        over = f"Over all {found.trials} trials{allowed}"
        if not found.leads:
            return f"{over}, {none}."
        largest = sorted(found.leads, key=lambda lead: -lead.gain.value)[:MOST_LEADS]
        leads = "; ".join(
            f"r={lead.better} is better than r={lead.worse} by {lead.words(self.objective)}"
            for lead in largest
        )
        others = len(found.leads) - len(largest)
        more = f". So it is of {counted(others, 'other pair')}, by less" if others else ""
        return f"{over}: {leads}{more}."


def rank_ladders(results: StudyResults) -> list[RankLadder]:
    """Return a ladder for every arm with finished trials of at least two ranks."""
    ladders = (rank_ladder(arm, *_noise(results, arm.name)) for arm in results.arms)
    return [ladder for ladder in ladders if ladder is not None]


def rank_ladder(arm: ArmResult, noise: float | None, freedom: int = 0) -> RankLadder | None:
    """Return an arm's ranks, or None if fewer than two ranks have a finished trial.

    The result is also None if adapter.trainable_parameters sets the rank: the rank then follows from the
    target modules, and a larger one adds no parameters.

    Args:
        arm: the arm with its trials.
        noise: standard deviation of the objective over seeds, or None.
        freedom: degrees of freedom of the noise: its seeds minus one.
    """
    # With a fixed number of parameters a larger rank means fewer target modules.
    if equal_size(arm):
        return None
    # Pruned trials did not see the end of their schedule and are left out.
    tried: dict[int, list[TrialResult]] = {}
    for trial in arm.trials:
        rank = trial.params.get(RANK)
        if isinstance(rank, int | float) and trial.complete and trial.value is not None:
            tried.setdefault(int(rank), []).append(trial)
    best = next((trial for trial in arm.trials if trial.complete), None)
    choices = {} if best is None else _choices(best)
    alike = {
        rank: [trial for trial in trials if _choices(trial) == choices]
        for rank, trials in tried.items()
    }
    found = {rank: trials for rank, trials in alike.items() if trials}
    rungs: list[RankStep] = []
    for rank in sorted(found):
        below = rungs[-1] if rungs else None
        rungs.append(_rung(rank, found[rank], below, arm.objective))
    if len(rungs) < 2:
        return None
    like = tuple(f"{name}={value}" for name, value in short_names(choices).items())
    left_out = tuple(sorted(tried.keys() - found.keys()))
    effects = rank_effects([trial for each in found.values() for trial in each], arm.objective)
    return RankLadder(
        arm.name, arm.objective, tuple(rungs), noise, effects, freedom, like, left_out
    )


def _choices(trial: TrialResult) -> dict[str, Scalar]:
    """Return the settings of a trial that are no numbers, in which trials must agree to compare."""
    return {
        key: value
        for key, value in trial.params.items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    }


def rank_sheet(ladder: RankLadder) -> TextTable:
    """Return the ladder as a table."""
    columns = (
        *("r", "trials", metric_words(ladder.objective.metric), "trainable", "time/trial"),
        *("gain", "per doubling", "per 1M parameters", "per second"),
    )
    rows = [_row(rung) for rung in ladder.rungs]
    dropped_first = ("per second", "per 1M parameters", "time/trial", "trainable", "gain")
    title = f"{ladder.arm}: gain by rank"
    return TextTable(title, columns, tuple(rows), dropped_first=dropped_first)


def _noise(results: StudyResults, name: str) -> tuple[float | None, int]:
    """Return the spread over seeds of an arm's winner, and its degrees of freedom."""
    # Seeds are only repeated for finalists, so the noise is known only for compared arms.
    for found in results.decisive:
        for at, arm in enumerate((found.arm, found.reference)):
            if arm == name:
                return found.noise[at], found.seeds[at] - 1
    return None, 0


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


def _row(rung: RankStep) -> tuple[str, ...]:
    return (
        str(rung.r),
        str(rung.trials),
        f"{rung.value:.4f}",
        number(rung.trainable),
        duration(rung.seconds),
        number(rung.gain, "{:+.4f}"),
        number(rung.per_doubling, "{:+.4f}"),
        number(rung.per_million_parameters, "{:+.3g}"),
        number(rung.per_second, "{:+.2g}"),
    )
