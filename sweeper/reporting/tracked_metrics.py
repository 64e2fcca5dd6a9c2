"""The verdict's figures as metrics of the study's MLflow run.

Users' dashboards query these names, so they never change.
"""

from __future__ import annotations

from collections.abc import Iterator

from sweeper.config.space import Point
from sweeper.reporting.arm_comparison import ArmComparison, ArmSide
from sweeper.reporting.intervals import IntervalEstimate
from sweeper.reporting.results import StudyResults, headline
from sweeper.reporting.verdict import Verdict, judge


def study_figures(results: StudyResults) -> tuple[dict[str, float], Point]:
    """Return the metrics and the best trial's parameters for the study's own run."""
    figures, best = headline(results)
    verdict = verdict_metrics(judge(results)) if results.arms else {}
    return {**figures, **verdict}, best


def verdict_metrics(verdict: Verdict) -> dict[str, float]:
    """Return the verdict's figures by metric name, without those that were not measured.

    Examples: `test/lora/loss`, `verdict/lora/difference` (the arm's value minus its reference's),
    `verdict/lora/time_ratio`, and `verdict/lora/retained_percent` with the ends of its 95 % interval
    under the suffixes `_low` and `_high`.
    """
    found: dict[str, float | None] = {}
    for side in verdict.sides:
        found |= dict(_of_side(side))
    for duel in verdict.duels:
        found |= dict(_of_duel(duel))
    for gain in verdict.recipes:
        if gain.comparison is not None:
            name = f"verdict/{gain.arm}/difference_to_recipe"
            found |= dict(_estimate(name, gain.comparison.difference))
    found["test/look"] = verdict.look
    # MLflow rejects None.
    return {name: value for name, value in found.items() if value is not None}


def _of_side(side: ArmSide) -> Iterator[tuple[str, float | None]]:
    yield f"verdict/{side.arm}/value", side.value
    yield f"verdict/{side.arm}/seconds_per_trial", side.seconds_per_trial
    yield f"test/{side.arm}/loss", side.test_loss
    yield f"test/{side.arm}/untuned_loss", side.untuned_test_loss
    yield from _estimate(f"general/{side.arm}/forgetting", side.forgetting)


def _of_duel(duel: ArmComparison) -> Iterator[tuple[str, float | None]]:
    at, ratios = f"verdict/{duel.side.arm}", duel.cost_ratios
    yield f"{at}/compared_value", duel.values[0]
    yield f"{at}/reference_value", duel.values[1]
    yield from _estimate(f"{at}/difference", duel.difference)
    yield from _estimate(f"{at}/retained_percent", duel.retained)
    yield f"{at}/noise", duel.noise[0]
    yield f"{at}/reference_noise", duel.noise[1]
    yield f"{at}/trainable_ratio", ratios.trainable
    yield from _estimate(f"{at}/time_ratio", ratios.time)
    yield f"{at}/memory_ratio", ratios.memory
    yield f"{at}/artifact_ratio", ratios.artifact


def _estimate(name: str, found: IntervalEstimate | None) -> Iterator[tuple[str, float | None]]:
    if found is not None:
        yield name, found.value
        yield f"{name}_low", found.low
        yield f"{name}_high", found.high
