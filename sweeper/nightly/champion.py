"""The rule by which a challenger replaces the champion: only if it is better beyond doubt.

Decided is which artifact has the lower loss on the population of the gate's rows. Decisions rest on
per-example losses on the gate split. The validation split selected the challenger, and a test split
that is evaluated every night would soon be fitted too. The module knows no registry and no model.

- The challenger must be better by a margin, by default one standard deviation between seeds: what
  another seed of the same configuration would change is no reason to replace a model.
- A champion is challenged night after night on the same rows. All its challenges together may promote a
  challenger that is not better with a probability of 5 %, of which each look at the gate spends a part.
- A part of the rows decides nothing. After a promotion the improvement is estimated on them, because the
  rows that decided exaggerate it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sweeper.core.value import FrozenValue
from sweeper.nightly.nightly_set import ChampionRules
from sweeper.reporting.intervals import (
    ArmContrast,
    IntervalEstimate,
    JointMeans,
    SeedLosses,
    contrast,
)

Rows = NDArray[np.int64]
"""Numbers of rows of the gate."""
SPLIT = "gate"
GATE_ALPHA = 0.05
"""Probability that any challenge of one champion promotes a model that is not better by the margin."""
RESERVED = 5
"""One row in so many decides nothing, and estimates the size of a promotion."""
FEWEST_ROWS = 50
"""Rows of a gate below which none is reserved."""
NEARLY_SPENT = 0.95
"""Share of GATE_ALPHA from which on the gate needs new rows."""


class ChallengeEvidence(FrozenValue):
    """The size and the forgetting of a challenger."""

    size_mib: float
    forgotten: float | None
    """Loss on general text minus the untuned base's in nats. None if not measured."""

    def __str__(self) -> str:
        forgotten = "not measured" if self.forgotten is None else f"{self.forgotten:+.4f} nats"
        return f"Forgetting {forgotten}, size {self.size_mib:.1f} MiB"


class ChampionDecision(FrozenValue):
    """The decision on a challenger, with its evidence."""

    model: str
    """Name of the registered model."""
    challenger: str
    """The trial as STUDY/ARM/NUMBER."""
    champion: str | None
    """The champion's version before the decision, or None without a champion."""
    verdict: Literal["promoted", "kept", "undecided"]
    reason: str
    margin: float | None = None
    """Nats per token by which the whole interval must be below zero."""
    contrast: ArmContrast | None = None
    """Challenger against champion on the gate split. Without a champion, against the untuned base."""
    evidence: ChallengeEvidence | None = None
    look: int | None = None
    """Number of this look at the gate among those that this champion was challenged in."""
    confirmed: IntervalEstimate | None = None
    """The difference on rows that did not decide, after a promotion."""


def gate_alpha(look: int) -> float:
    """Return the part of GATE_ALPHA that a look at the gate may spend."""
    # 6 / pi^2 * (1 + 1/4 + 1/9 + …) is one, however many looks follow.
    return GATE_ALPHA * 6 / math.pi**2 / look**2


def gate_spent(look: int) -> float:
    """Return the share of GATE_ALPHA that is spent after so many looks at the gate."""
    return sum(gate_alpha(each) for each in range(1, look + 1)) / GATE_ALPHA


def decide(
    names: tuple[str, str, str | None],
    challenger: SeedLosses,
    champion: SeedLosses | None,
    base: SeedLosses,
    evidence: ChallengeEvidence,
    rules: ChampionRules,
    seed_deviation: float | None = None,
    look: int = 1,
) -> ChampionDecision:
    """Return the decision whether a challenger replaces the champion.

    The one-sided test that challenger minus champion is below -margin must be significant at the level
    of this look. Without a champion the untuned base is the rival, and the margin is zero.

    Args:
        names: names of the registered model, the challenger and the champion.
        challenger: losses of the challenger on the gate split.
        champion: losses of the champion on the same examples, or None.
        base: losses of the untuned base on the same examples, with one row.
        evidence: size and forgetting of the challenger.
        rules: the margin and the limits of size and forgetting.
        seed_deviation: standard deviation between seeds of the challenger's finalists, or None.
        look: number of this look at the gate since the champion was promoted.

    Raises:
        ValueError: the models were not judged on the same examples.
    """
    model, who, holder = names
    rival = "the untuned base" if champion is None else f"champion {holder}"
    margin = _margin(rules, seed_deviation, champion)
    if margin is None:
        return ChampionDecision(
            model=model,
            challenger=who,
            champion=holder,
            verdict="undecided",
            reason="the spread between seeds is unknown, and with it the margin. Train finalists with "
            "two seeds (finalists.fresh_seeds=2), or set champion.margin",
            evidence=evidence,
        )
    # Without a champion the base is both the rival and the zero line.
    models = (challenger, champion or base, base)
    decisive, reserved = _parts(challenger.tokens.size)
    own, other, zero = (_rows(one, decisive) for one in models)
    found = contrast((who, holder or "base"), own, other, zero, SPLIT)
    broken = _broken_limits(evidence, rules)
    # Level and margin keep a challenger that is better by chance from replacing a champion.
    level = gate_alpha(look)
    ahead = JointMeans.of((own, other, zero)).combined(-1, 1, 0).above(margin) < level
    promoted = ahead and not broken
    confirmed = None
    if promoted and reserved.size:
        own, other, zero = (_rows(one, reserved) for one in models)
        confirmed = contrast((who, holder or "base"), own, other, zero, SPLIT).difference
    interval = (
        f"{found.difference.value:+.4f} nats against {rival} ({found.difference.ends}, "
        f"required margin {margin:.4f} at a level of {level:.2g})"
    )
    return ChampionDecision(
        model=model,
        challenger=who,
        champion=holder,
        verdict="promoted" if promoted else "kept",
        reason=". ".join(
            [*broken, interval, *_of_promotion(confirmed), str(evidence), _of_gate(look)]
        ),
        margin=margin,
        contrast=found,
        evidence=evidence,
        look=look,
        confirmed=confirmed,
    )


def _margin(
    rules: ChampionRules, seed_deviation: float | None, champion: SeedLosses | None
) -> float | None:
    """Return the margin, or None if it is that of the seeds and their spread is unknown."""
    if rules.margin is not None:
        return rules.margin
    # An untuned base has no seed that could have been lucky.
    return 0.0 if champion is None else seed_deviation


def _parts(rows: int) -> tuple[Rows, Rows]:
    """Return the numbers of the rows that decide, and of those that only estimate."""
    numbers = np.arange(rows)
    reserved = numbers % RESERVED == RESERVED - 1
    if rows < FEWEST_ROWS:
        reserved[:] = False
    return numbers[~reserved], numbers[reserved]


def _rows(models: SeedLosses, rows: Rows) -> SeedLosses:
    return SeedLosses(models.nll[:, rows], models.tokens[rows])


def _of_promotion(confirmed: IntervalEstimate | None) -> list[str]:
    if confirmed is None:
        return []
    return [f"On the rows that did not decide: {confirmed.value:+.4f} nats ({confirmed.ends})"]


def _of_gate(look: int) -> str:
    spent = gate_spent(look)
    words = (
        f"This was look {look} at the gate for this champion, {100 * spent:.0f} % of it is used up"
    )
    if spent < NEARLY_SPENT:
        return words
    return f"{words}: name new rows (experiments[].gate) to go on finding small improvements"


def _broken_limits(evidence: ChallengeEvidence, rules: ChampionRules) -> list[str]:
    # There is no limit on latency: merged adapters all answer at the speed of their base.
    broken = []
    if rules.max_size_mib is not None and evidence.size_mib > rules.max_size_mib:
        limit = f"{rules.max_size_mib:g}"
        broken.append(f"Its size of {evidence.size_mib:.1f} MiB exceeds max_size_mib={limit}")
    if rules.max_forgetting is not None:
        limit = f"max_forgetting={rules.max_forgetting:g}"
        if evidence.forgotten is None:
            missing = "no general text is configured (evaluation.general_text.source)"
            broken.append(f"{limit} cannot be checked, because {missing}")
        elif evidence.forgotten > rules.max_forgetting:
            broken.append(f"Its forgetting of {evidence.forgotten:.4f} nats exceeds {limit}")
    return broken
