"""The comparison of two arms: what was measured, and which of three outcomes that is.

*Ahead* needs an interval on the test split over at least two fresh seeds of each arm, and a p value that
the number of looks at the split allows. *Equivalent* is a difference within a margin that was fixed
before the first trial. Everything else is *undecided*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sweeper.config.settings import Objective
from sweeper.core.value import EquivalenceMargin
from sweeper.reporting.intervals import ENDLESS, POWER, IntervalEstimate, t_quantile

FEWEST_SEEDS = 2
"""Usable seeds of an arm below which nothing is decided. The spread of one seed is unknown."""
MOST_SEEDS = 30
"""Seeds of an arm beyond which more of them are no advice."""

OutcomeName = Literal["ahead", "equivalent", "undecided"]


@dataclass(frozen=True)
class ArmSide:
    """An arm in the verdict: its best configuration and its costs."""

    arm: str
    label: str
    point: str
    value: float
    """The objective of its best trial, on the validation split that selected the trial."""
    base_value: float
    test_loss: float | None
    """Mean loss over the seeds on the test split, or None if the arm was not evaluated there."""
    untuned_test_loss: float | None
    forgetting: IntervalEstimate | None
    """Loss on general text minus that of its untuned base, in nats per token."""
    seeds: int
    trials: int
    trainable: float | None
    device_seconds: float
    """Device time of its search and of its finalists in seconds."""
    seconds_per_trial: float | None
    peak_memory_mib: float | None
    artifact_mib: float | None
    run_id: str | None = None
    """The MLflow run that the model was adopted from. Trials and times are then those of that run."""
    failed_seeds: str = ""
    """How many of the winner's seeds diverged or ran out of memory, or '' if none did."""


@dataclass(frozen=True)
class CostRatios:
    """Costs of an arm divided by those of its reference. None where either is unknown."""

    trainable: float | None
    time: IntervalEstimate | None
    """Time of a training. None also if it is not told apart from the reference's."""
    memory: float | None
    artifact: float | None


@dataclass(frozen=True)
class ComparisonEvidence:
    """The facts that a comparison rests on besides its figures."""

    standard_error: float | None = None
    freedom: float | None = None
    seed_share: float = 0.0
    seeds: tuple[int, int] = (1, 1)
    fresh: bool = False
    """True if none of the seeds took part in the choice of the configurations."""
    ahead: bool = False
    """True if the p value is below what the looks at the split and the number of arms allow."""
    equivalent: bool = False
    """True if both one-sided tests reject a difference beyond the margin, at the same level."""
    margin: EquivalenceMargin | None = None
    margin_size: float | None = None
    """The margin in the metric's unit."""
    level: float = 0.05
    """Probability of a false lead that this look may have."""
    settled: bool = True
    """False while the answer is PROVISIONAL."""
    fixed_seeds: tuple[str, ...] = ()
    """What the seeds did not vary, because its own seed was given."""


@dataclass(frozen=True)
class ArmComparison:
    """The comparison of an arm with its reference."""

    side: ArmSide
    reference: ArmSide
    objective: Objective
    split: str
    values: tuple[float, float]
    """Values of the arm and of the reference on that split, as means over seeds."""
    difference: IntervalEstimate
    """The arm's value minus the reference's, in the metric's unit. Below zero the arm is ahead if the
    metric is minimised, and behind if it is maximised."""
    retained: IntervalEstimate | None
    """The arm's improvement over the base in % of the reference's. None if that is not certain."""
    noise: tuple[float | None, float | None]
    """Standard deviation over seeds of the arm and of the reference, None for one seed."""
    time: IntervalEstimate | None = None
    """Time of a training of the arm over the reference's (sweeper.reporting.time_ratio)."""
    on_cpu: bool = False
    """True if both were trained on CPUs. Times are then CPU seconds."""
    base: float | None = None
    """The untuned base's value on that split, from which both improvements count."""
    evidence: ComparisonEvidence = ComparisonEvidence()

    @property
    def outcome(self) -> OutcomeName:
        """The outcome: a side is ahead, both are equivalent, or neither is shown."""
        found = self.evidence
        judged = self.split == "test" and self.difference.low is not None
        sound = found.settled and found.fresh and min(found.seeds) >= FEWEST_SEEDS
        if not (judged and sound):
            return "undecided"
        # A lead within the margin is a lead of no importance, so equivalence is asked first.
        if found.equivalent:
            return "equivalent"
        return "ahead" if found.ahead and not self.difference.has(0) else "undecided"

    @property
    def ahead(self) -> str | None:
        """Label of the side that is ahead, or None."""
        return self.better.label if self.outcome == "ahead" else None

    @property
    def better(self) -> ArmSide:
        """The side with the better value, even if the difference may be chance."""
        arm_leads = self.objective.gain(self.difference.value, over=0) > 0
        return self.side if arm_leads else self.reference

    @property
    def improves(self) -> tuple[bool, bool]:
        """True if the arm and the reference are better than the untuned base."""
        if self.base is None:
            return True, True
        own, reference = (self.objective.gain(value, over=self.base) for value in self.values)
        return own > 0, reference > 0

    @property
    def visible_gap(self) -> float | None:
        """The smallest difference that this comparison would have found in 80 of 100 studies."""
        error, freedom = self.evidence.standard_error, self.evidence.freedom
        if error is None:
            return None
        return error * visible_reach(self.evidence.level, freedom)

    @property
    def needed(self) -> NeededEvidence | None:
        """The seeds and rows that would decide a difference of the observed size, if that is known."""
        error = self.evidence.standard_error
        if not error:
            return None
        observed, margin = abs(self.difference.value), self.evidence.margin_size
        # Beyond the margin a lead is shown, within it the equivalence.
        target = observed if margin is None else max(observed, margin - observed)
        if target == 0:
            return None
        wanted = (target / visible_reach(self.evidence.level, None)) ** 2
        return _needed(error**2, self.evidence, wanted)

    @property
    def cost_ratios(self) -> CostRatios:
        """The arm's costs over its reference's."""
        side, reference = self.side, self.reference
        return CostRatios(
            trainable=_ratio(side.trainable, reference.trainable),
            time=self.time,
            # On a CPU the peak is that of the process, most of which rests in memory anyway.
            memory=None if self.on_cpu else _ratio(side.peak_memory_mib, reference.peak_memory_mib),
            artifact=_ratio(side.artifact_mib, reference.artifact_mib),
        )


@dataclass(frozen=True)
class NeededEvidence:
    """The evidence that would decide a comparison: fresh seeds, rows of the test split, or both."""

    seeds: int
    """Fresh seeds of each arm."""
    rows: float
    """Factor on the number of examples of the test split."""


def visible_reach(level: float, freedom: float | None) -> float:
    """Return the standard errors between no difference and one that is found with POWER."""
    nu = ENDLESS if freedom is None else freedom
    return t_quantile(1 - level / 2, nu) + t_quantile(POWER, nu)


def _needed(variance: float, found: ComparisonEvidence, wanted: float) -> NeededEvidence:
    """Return the seeds and rows that bring a variance down to the wanted one."""
    of_seeds = found.seed_share * variance
    of_rows = variance - of_seeds
    have = max(min(found.seeds), FEWEST_SEEDS)
    # Rows are asked for only where seeds alone would not do, because they need another study.
    # The rows may have three quarters of the variance. Beyond that rows and seeds get half each.
    rows = 1.0 if of_rows <= 0.75 * wanted else of_rows / (0.5 * wanted)
    left = wanted - of_rows / rows
    seeds = max(have, math.ceil(have * of_seeds / left))
    return NeededEvidence(seeds, rows)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
