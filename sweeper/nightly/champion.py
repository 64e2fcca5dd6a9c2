"""The rule by which a challenger replaces the champion: only if it is better with 95 % confidence.

Decisions rest on per-example losses on the gate split. The validation split selected the challenger,
and a test split that is evaluated every night would soon be fitted too. The module knows no registry
and no model.
"""

from __future__ import annotations

from typing import Literal

from sweeper.core.value import FrozenValue
from sweeper.nightly.nightly_set import ChampionRules
from sweeper.reporting.intervals import ArmContrast, SeedLosses, contrast

SPLIT = "gate"
SEED_SPREADS = 2.0
"""Margin with champion.margin=null, in standard deviations over seeds.

Two configurations that differ by chance alone differ by less than that in 84 % of cases (the difference
of two has sqrt(2) times the standard deviation of one).
"""


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


def decide(
    names: tuple[str, str, str | None],
    challenger: SeedLosses,
    champion: SeedLosses | None,
    base: SeedLosses,
    evidence: ChallengeEvidence,
    rules: ChampionRules,
) -> ChampionDecision:
    """Return the decision whether a challenger replaces the champion.

    The upper end of the paired 95 % interval of challenger minus champion must be below -margin.
    Without a champion the untuned base is the rival.

    Args:
        names: names of the registered model, the challenger and the champion.
        challenger: losses of the challenger on the gate split.
        champion: losses of the champion on the same examples, or None.
        base: losses of the untuned base on the same examples, with one row.
        evidence: size and forgetting of the challenger.
        rules: the margin and the limits of size and forgetting.

    Raises:
        ValueError: the models were not judged on the same examples.
    """
    model, who, holder = names
    rival = "the untuned base" if champion is None else f"champion {holder}"
    # Without a champion the base is both the rival and the zero line.
    found = contrast((who, holder or "base"), challenger, champion or base, base, SPLIT)
    margin = _margin(rules, found)
    broken = _broken_limits(evidence, rules)
    high = found.difference.high
    # A challenger that is better by chance would otherwise replace a champion every few nights.
    ahead = high is not None and high < -margin
    interval = (
        f"{found.difference.value:+.4f} nats against {rival} "
        f"(95 % interval {found.difference.low:+.4f} to {high:+.4f}, required margin {margin:.4f})"
    )
    return ChampionDecision(
        model=model,
        challenger=who,
        champion=holder,
        verdict="promoted" if ahead and not broken else "kept",
        reason=". ".join([*broken, interval, str(evidence)]),
        margin=margin,
        contrast=found,
        evidence=evidence,
    )


def _margin(rules: ChampionRules, found: ArmContrast) -> float:
    if rules.margin is not None:
        return rules.margin
    # Champion and challenger usually have one seed each, and then the spread is unknown.
    return SEED_SPREADS * max((spread for spread in found.noise if spread is not None), default=0.0)


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
