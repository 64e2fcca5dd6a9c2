"""Champion and challenger: a model is replaced only by one that is better beyond doubt.

Pure decisions on per-example losses of the gate split, a split of its own: validation chose the
challenger, and `test` would be worn out by a look every night. Knows no registry and no model.
"""

from __future__ import annotations

from typing import Literal

from sweeper.core.value import FrozenValue
from sweeper.nightly.nightly_set import ChampionRules
from sweeper.reporting.intervals import ArmContrast, SeedLosses, contrast

SPLIT = "gate"
SEED_SPREADS = 2.0
"""champion.margin=null: two configurations that differ by chance alone differ by less than this many
standard deviations over seeds in 84 % of cases (the difference of two has sqrt(2) of one's)."""


class ChallengeEvidence(FrozenValue):
    """What is known of a challenger besides its losses."""

    size_mib: float
    forgotten: float | None
    """Nats that it is worse than the untuned base on general text; None if nobody measured."""

    def __str__(self) -> str:
        forgotten = "not measured" if self.forgotten is None else f"{self.forgotten:+.4f} nats"
        return f"forgetting {forgotten}, {self.size_mib:.1f} MiB"


class ChampionDecision(FrozenValue):
    """Whether the champion moved, and on what evidence."""

    model: str
    """Registered model."""
    challenger: str
    """STUDY/ARM/NUMBER."""
    champion: str | None
    verdict: Literal["promoted", "kept", "undecided"]
    reason: str
    margin: float | None = None
    contrast: ArmContrast | None = None
    """Challenger against champion (or the untuned base, where there is none) on the gate split."""
    evidence: ChallengeEvidence | None = None


def decide(
    names: tuple[str, str, str | None],
    challenger: SeedLosses,
    champion: SeedLosses | None,
    base: SeedLosses,
    evidence: ChallengeEvidence,
    rules: ChampionRules,
) -> ChampionDecision:
    """Whether a challenger takes the champion's place.

    The upper end of the paired 95 % interval of challenger minus champion must lie below -margin.
    Where there is no champion yet, the untuned base stands in its place.

    Args:
        names: of the registered model, the challenger and the champion.
        challenger: judged on the gate split.
        champion: judged on the same examples, or None.
        base: the untuned base on the same examples, one row.
        evidence: what limits are checked against.
        rules: the limits.

    Raises:
        ValueError: they were not judged on the same examples.
    """
    model, who, holder = names
    rival = "the untuned base" if champion is None else f"champion {holder}"
    found = contrast((who, holder or "base"), challenger, champion or base, base, SPLIT)
    margin = _margin(rules, found)
    broken = _broken_limits(evidence, rules)
    high = found.difference.high
    ahead = high is not None and high < -margin
    interval = (
        f"{found.difference.value:+.4f} nats against {rival} "
        f"({found.difference.low:+.4f} to {high:+.4f}), margin {margin:.4f}"
    )
    return ChampionDecision(
        model=model,
        challenger=who,
        champion=holder,
        verdict="promoted" if ahead and not broken else "kept",
        reason="; ".join([*broken, interval, str(evidence)]),
        margin=margin,
        contrast=found,
        evidence=evidence,
    )


def _margin(rules: ChampionRules, found: ArmContrast) -> float:
    if rules.margin is not None:
        return rules.margin
    return SEED_SPREADS * max((spread for spread in found.noise if spread is not None), default=0.0)


def _broken_limits(evidence: ChallengeEvidence, rules: ChampionRules) -> list[str]:
    broken = []
    if rules.max_size_mib is not None and evidence.size_mib > rules.max_size_mib:
        limit = f"{rules.max_size_mib:g}"
        broken.append(f"its {evidence.size_mib:.1f} MiB are over max_size_mib={limit}")
    if rules.max_forgetting is not None:
        limit = f"max_forgetting={rules.max_forgetting:g}"
        if evidence.forgotten is None:
            named = "no general text is named (evaluation.general_text.source)"
            broken.append(f"{limit} is asked for, and {named}")
        elif evidence.forgotten > rules.max_forgetting:
            broken.append(f"it forgot {evidence.forgotten:.4f} nats, over {limit}")
    return broken
