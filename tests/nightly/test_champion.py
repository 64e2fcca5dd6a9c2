"""A champion is replaced only beyond doubt: the rule, on losses whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from sweeper.nightly.champion import (
    ChallengeEvidence,
    ChampionDecision,
    decide,
    gate_alpha,
    gate_spent,
)
from sweeper.nightly.nightly_set import ChampionRules
from sweeper.reporting.intervals import SeedLosses

EXAMPLES = 200
TOKENS = np.full(EXAMPLES, 10.0)
RULES = ChampionRules(margin=0.01, max_size_mib=None, max_forgetting=None)
SMALL = ChallengeEvidence(size_mib=1.0, forgotten=None)


def _judged(loss: float, *, noise: float = 0.0, seeds: int = 1, spread: float = 0.0) -> SeedLosses:
    """Examples of different difficulty, the same for every model; `noise` is a model's own."""
    random = np.random.default_rng(int(loss * 1000))
    hard = np.random.default_rng(0).normal(0, 5, EXAMPLES)
    own = random.normal(0, noise, (seeds, EXAMPLES)) if noise else np.zeros((seeds, EXAMPLES))
    shift = np.linspace(-spread, spread, seeds)[:, None]
    return SeedLosses(TOKENS * (loss + shift) + hard + own, TOKENS)


BASE = _judged(4.5)
NAMES = ("model", "study/lora/0003", "version 1")


def _decide(
    challenger: SeedLosses, champion: SeedLosses | None, rules: ChampionRules = RULES
) -> ChampionDecision:
    return decide(NAMES, challenger, champion, BASE, SMALL, rules)


def test_clearly_better_is_promoted() -> None:
    """0.1 nats better on the same examples, where the margin is 0.01."""
    decision = _decide(_judged(3.8), _judged(3.9))
    assert decision.verdict == "promoted"
    assert decision.contrast is not None
    assert decision.contrast.split == "gate"
    assert decision.contrast.difference.value == pytest.approx(-0.1)


def test_better_by_less_than_the_margin_is_refused() -> None:
    """0.005 nats better without any noise is still within the margin."""
    assert _decide(_judged(3.895), _judged(3.9)).verdict == "kept"


def test_better_by_luck_is_refused() -> None:
    """A difference of 0.02 nats drowns in the examples' own noise of 5 nats each."""
    decision = _decide(_judged(3.88, noise=5.0), _judged(3.9, noise=5.0))
    assert decision.verdict == "kept"


def test_worse_is_refused() -> None:
    """The champion keeps its place before a worse model."""
    assert _decide(_judged(4.0), _judged(3.9)).verdict == "kept"


def test_first_champion_must_beat_the_untuned_base() -> None:
    """Without a champion the base is the rival: one model passes, one does not."""
    assert _decide(_judged(3.9), None).verdict == "promoted"
    assert _decide(_judged(4.498), None).verdict == "kept"


def test_the_margin_is_one_deviation_between_seeds() -> None:
    """Seeds 0.04 apart: 0.03 nats better is what another seed may bring, 0.06 is not."""
    rules = RULES.model_copy(update={"margin": None})
    decided = [
        decide(NAMES, _judged(loss), _judged(3.9), BASE, SMALL, rules, seed_deviation=0.04)
        for loss in (3.87, 3.84)
    ]
    assert [each.margin for each in decided] == [0.04, 0.04]
    assert [each.verdict for each in decided] == ["kept", "promoted"]


def test_an_unknown_spread_decides_nothing() -> None:
    """No margin is made up. The reason says what to train or to set."""
    rules = RULES.model_copy(update={"margin": None})
    decision = _decide(_judged(3.5), _judged(3.9), rules)
    assert decision.verdict == "undecided"
    assert "champion.margin" in decision.reason
    assert _decide(_judged(3.5), None, rules).verdict == "promoted"


def test_all_looks_together_spend_five_percent() -> None:
    """However many nights follow, and the first look has the largest part."""
    spent = [gate_alpha(look) for look in range(1, 10_000)]
    assert sum(spent) == pytest.approx(0.05, rel=1e-3)
    assert sum(spent) < 0.05
    assert spent == sorted(spent, reverse=True)
    assert gate_spent(12) > 0.95


def test_a_promotion_is_estimated_on_rows_that_did_not_decide() -> None:
    """A fifth of the rows: what decides is not among them, and the reason tells both figures."""
    challenger, champion = _judged(3.8, noise=0.3), _judged(3.9, noise=0.3)
    decision = _decide(challenger, champion)
    assert decision.contrast is not None
    assert decision.confirmed is not None
    assert decision.contrast.examples == EXAMPLES - EXAMPLES // 5
    rows = np.arange(EXAMPLES) % 5 == 4
    apart = (challenger.nll - champion.nll)[0, rows].sum() / TOKENS[rows].sum()
    assert decision.confirmed.value == pytest.approx(apart)
    assert "On the rows that did not decide" in decision.reason


def test_the_gate_wears_out_and_says_so() -> None:
    """From the twelfth look of a champion on, the reason asks for new rows."""
    words = [
        decide(NAMES, _judged(3.9), _judged(3.9), BASE, SMALL, RULES, look=look).reason
        for look in (1, 12)
    ]
    assert "look 1 at the gate for this champion, 61 % of it is used up" in words[0]
    assert "name new rows" in words[1]
    assert "name new rows" not in words[0]


@pytest.mark.parametrize(
    ("rules", "evidence", "words"),
    [
        ({"max_size_mib": 10.0}, {"size_mib": 12.0}, "size of 12.0 MiB exceeds max_size_mib=10"),
        (
            {"max_forgetting": 0.1},
            {"forgotten": 0.3},
            "forgetting of 0.3000 nats exceeds max_forgetting=0.1",
        ),
        (
            {"max_forgetting": 0.1},
            {},
            "no general text is configured (evaluation.general_text.source)",
        ),
    ],
)
def test_limits_refuse_a_better_model(
    rules: dict[str, float], evidence: dict[str, float], words: str
) -> None:
    """Too large, too forgetful, or forgetting asked for and not measured."""
    decision = decide(
        NAMES,
        _judged(3.8),
        _judged(3.9),
        BASE,
        SMALL.model_copy(update=evidence),
        RULES.model_copy(update=rules),
    )
    assert decision.verdict == "kept"
    assert words in decision.reason


def test_other_examples_do_not_compare() -> None:
    """Losses over other tokens are refused rather than compared."""
    other = SeedLosses(np.ones((1, EXAMPLES)), np.full(EXAMPLES, 11.0))
    with pytest.raises(ValueError, match="different examples"):
        _decide(other, _judged(3.9))
