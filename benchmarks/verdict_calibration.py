"""How often the verdict and the champion's gate are right, in simulated studies of known truth.

    python -m benchmarks.verdict_calibration          # 2,000 studies a cell on each of three seeds
    python -m benchmarks.verdict_calibration --studies 200

Each study has a search, a choice among finalists over their seeds, and a judgement over fresh seeds on a
test split. Everything that is concluded goes through the product's own functions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.record import record
from sweeper.core.value import EquivalenceMargin
from sweeper.nightly.champion import ChallengeEvidence, decide
from sweeper.nightly.nightly_set import ChampionRules
from sweeper.reporting.intervals import ArmContrast, SeedLosses, contrast, pooled_spread
from sweeper.reporting.split_looks import look_alpha

SEEDS = (1, 2, 3)
"""Seeds of the committed figures."""
GAIN = 0.7
"""Nats by which both arms improve on the untuned base."""
MARGIN = EquivalenceMargin(share=0.05)


@dataclass(frozen=True)
class SimulatedWorld:
    """A study of known truth."""

    seed_deviations: tuple[float, float] = (0.01, 0.01)
    """Standard deviation between seeds of the arm and of the reference, in nats."""
    gap: float = 0.0
    """True loss of the arm minus the reference's."""
    examples: int = 300
    paired_deviation: float = 0.15
    """Standard deviation of the paired difference between examples, in nats per token."""
    correlation: float = 0.0
    """Correlation within groups of ten examples (ICC)."""
    trials: int = 12
    """Trials of the arm's search, whose configurations are equally good."""
    top: int = 2
    selection_seeds: int = 2
    fresh_seeds: int = 3
    reuse: bool = False
    """True judges the seeds that chose the winner too, as the product did before."""


@dataclass(frozen=True)
class SimulatedStudy:
    """The winners of a simulated study, with the seeds that chose them."""

    world: SimulatedWorld
    tokens: np.ndarray
    shared: np.ndarray
    """Difficulty of each example for both arms."""
    own: np.ndarray
    """Difference of the arm on each example."""
    groups: np.ndarray | None
    chosen: tuple[list[list[float]], list[list[float]]]
    """Luck of the finalists' seeds of each arm, by finalist."""
    winners: tuple[list[float], list[float]]
    """Luck of the winners' own seeds."""

    @classmethod
    def draw(cls, world: SimulatedWorld, random: np.random.Generator) -> SimulatedStudy:
        """Return a study with its search done and its winners chosen."""
        count = world.examples
        tokens = random.integers(5, 40, count).astype(float)
        groups, own = None, random.normal(0, world.paired_deviation, count)
        if world.correlation:
            groups = np.arange(count) // 10
            between = random.normal(0, world.paired_deviation, groups[-1] + 1)[groups]
            own = between * world.correlation**0.5 + own * (1 - world.correlation) ** 0.5
        searched = (_searched(world, arm, random) for arm in (0, 1))
        chosen, winners = zip(*searched, strict=True)
        shared = random.gamma(4, 1, count)
        return cls(world, tokens, shared, own, groups, chosen, winners)

    def contrast(self, random: np.random.Generator, fresh_seeds: int | None = None) -> ArmContrast:
        """Return the product's comparison of the winners over fresh seeds."""
        arm, reference, base = self.judged(random, fresh_seeds)
        return contrast(("arm", "reference"), arm, reference, base, margin=MARGIN, fresh=True)

    def judged(
        self, random: np.random.Generator, fresh_seeds: int | None = None
    ) -> tuple[SeedLosses, SeedLosses, SeedLosses]:
        """Return the losses of arm, reference and base on the test split."""
        world = self.world
        count = world.fresh_seeds if fresh_seeds is None else fresh_seeds
        rows = []
        for arm, gap in enumerate((world.gap + self.own, np.zeros_like(self.own))):
            luck = random.normal(0, world.seed_deviations[arm], count)
            if world.reuse:
                luck = np.array([*self.winners[arm], *luck])[:count]
            noise = random.normal(0, 0.05, (luck.size, self.tokens.size))
            nll = (self.shared + gap + luck[:, None] + noise) * self.tokens
            further = None if world.reuse else pooled_spread(self.chosen[arm])
            rows.append(SeedLosses(nll, self.tokens, self.groups, further))
        base = SeedLosses((self.shared + GAIN)[None, :] * self.tokens, self.tokens, self.groups)
        return rows[0], rows[1], base


def _searched(
    world: SimulatedWorld, arm: int, random: np.random.Generator
) -> tuple[list[list[float]], list[float]]:
    """Return the luck of the finalists' further seeds by finalist, and that of the winner's seeds."""
    deviation = world.seed_deviations[arm]
    # The reference searches fewer configurations, as full fine-tuning does.
    trials = world.trials if arm == 0 else 5
    first = np.sort(random.normal(0, deviation, trials))[: world.top]
    more = random.normal(0, deviation, (first.size, world.selection_seeds - 1))
    luck = np.concatenate([first[:, None], more], axis=1)
    winner = int(luck.mean(axis=1).argmin())
    return [list(each[1:]) for each in luck], list(luck[winner])


CELLS: Mapping[str, SimulatedWorld] = {
    "equal noise": SimulatedWorld(),
    "selection of 2 of 12 by 2 seeds": SimulatedWorld(seed_deviations=(0.02, 0.02)),
    "selection by three seeds": SimulatedWorld(seed_deviations=(0.02, 0.02), selection_seeds=3),
    "one selection seed": SimulatedWorld(top=1, selection_seeds=1),
    "unequal noise": SimulatedWorld(seed_deviations=(0.02, 0.002)),
    "groups": SimulatedWorld(correlation=0.3),
    "gap at the margin": SimulatedWorld(gap=0.05 * GAIN),
    "gap of 3 % of the gain": SimulatedWorld(gap=0.03 * GAIN),
    "gap of 6 % of the gain": SimulatedWorld(gap=0.06 * GAIN),
    "gap of 3 % of the gain, embedded default": SimulatedWorld(
        gap=0.03 * GAIN, top=1, selection_seeds=1
    ),
    "gap of 6 % of the gain, embedded default": SimulatedWorld(
        gap=0.06 * GAIN, top=1, selection_seeds=1
    ),
}


def calibrate(world: SimulatedWorld, studies: int, seed: int) -> dict[str, float]:
    """Return coverage, bias and the share of each outcome over simulated studies."""
    random = np.random.default_rng(seed)
    found = [SimulatedStudy.draw(world, random).contrast(random) for _ in range(studies)]
    covered = np.array([each.difference.has(world.gap) for each in found])
    widths = np.array(
        [2 * (each.difference.high or 0) - 2 * each.difference.value for each in found]
    )
    sharpest = widths <= np.quantile(widths, 0.25)
    alpha = look_alpha(1)
    ahead = np.array([(each.p_value or 1) <= alpha for each in found])
    equal = np.array([(each.equivalence_p or 1) <= alpha for each in found])
    errors = np.array([each.difference.value - world.gap for each in found])
    return {
        "coverage": float(covered.mean()),
        "coverage of the sharpest quarter": float(covered[sharpest].mean()),
        "ahead": float((ahead & ~equal).mean()),
        "equivalent": float(equal.mean()),
        "bias in seed deviations": float(errors.mean() / max(world.seed_deviations)),
        "median width": float(np.median(widths)),
        "share of lead at the 95 % interval": float(
            np.mean([not each.difference.has(0) for each in found])
        ),
    }


def over_looks(studies: int, seed: int, looks: int = 6) -> dict[str, float]:
    """Return how often equal arms are told apart at any look, while fresh seeds are added."""
    random = np.random.default_rng(seed)
    world = SimulatedWorld()
    wrong = np.zeros(looks)
    for _ in range(studies):
        study = SimulatedStudy.draw(world, random)
        for look in range(1, looks + 1):
            found = study.contrast(random, fresh_seeds=world.fresh_seeds + look - 1)
            if (found.p_value or 1) <= look_alpha(look):
                wrong[look - 1 :] += 1
                break
    return {f"by look {look + 1}": share / studies for look, share in enumerate(wrong)}


def nights(
    sets: int, seed: int, lead: float = 0.0, length: int = 100, deviation: float = 0.01
) -> Iterator[int | None]:
    """Yield the night of the first promotion in each set of nights, or None.

    Args:
        sets: number of sets of nights.
        seed: seed of the simulation.
        lead: how much better than the champion each night's challenger truly is, in seed deviations.
        length: nights of a set.
        deviation: standard deviation between seeds, in nats.
    """
    random = np.random.default_rng(seed)
    rules = ChampionRules(margin=None, max_size_mib=None, max_forgetting=None)
    tokens = np.full(250, 10.0)
    # A fifth of the rows is reserved, so 200 decide: their error is half a seed deviation.
    spread = 0.5 * deviation * 200**0.5
    for _ in range(sets):
        base = SeedLosses(random.gamma(4, 1, (1, 250)) * tokens + GAIN * tokens, tokens)
        champion = base.nll[0] - GAIN * tokens
        promoted = None
        for night in range(1, length + 1):
            own = random.normal(-lead * deviation, spread, 250) * tokens
            seen = deviation * (random.chisquare(4) / 4) ** 0.5
            decision = decide(
                ("model", "challenger", "version 1"),
                SeedLosses((champion + own)[None, :], tokens),
                SeedLosses(champion[None, :], tokens),
                base,
                ChallengeEvidence(size_mib=1.0, forgotten=None),
                rules,
                seed_deviation=seen,
                look=night,
            )
            if decision.verdict == "promoted":
                promoted = night
                break
        yield promoted


def measure(studies: int) -> dict[str, object]:
    """Return every figure for each committed seed."""
    began = time.process_time()
    found: dict[str, object] = {
        name: {str(seed): calibrate(world, studies, seed) for seed in SEEDS}
        for name, world in CELLS.items()
    }
    found["equal arms over six looks"] = {str(seed): over_looks(studies, seed) for seed in SEEDS}
    sets = max(50, studies // 10)
    found["100 nights of equal models: some promotion"] = {
        str(seed): float(np.mean([night is not None for night in nights(sets, seed)]))
        for seed in SEEDS
    }
    found["three deviations better each night: promoted within five"] = {
        str(seed): float(np.mean([night is not None for night in nights(studies, seed, 3.0, 5)]))
        for seed in SEEDS
    }
    return {"studies": studies, "cpu_minutes": (time.process_time() - began) / 60, "cells": found}


def main() -> None:
    """Measure, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    record("verdict_calibration", measure(parser.parse_args().studies))


if __name__ == "__main__":
    main()
