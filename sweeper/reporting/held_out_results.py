"""Comparisons of the arms' winners on held-out text.

Winners are compared with each other on the test split, and with their untuned base on general text.
The module turns per-example losses into contrasts and knows no worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sweeper.config.settings import SCORED_METRICS
from sweeper.reporting.finalist_results import ArmConclusion
from sweeper.reporting.intervals import (
    ArmContrast,
    SeedLosses,
    contrast,
    example_rows,
    pooled_spread,
)
from sweeper.reporting.results import StudyResults
from sweeper.reporting.served_forms import served_contrasts
from sweeper.reporting.verdict_doubts import reference_arm

SWITCHED_OFF = "finalists.top=0 selects no finalists"
LEFT_ALONE = "finalists.test=false keeps the test split unread"
NOT_ENDED = "the study has not finished"
NO_TEST_SPLIT = "the data have no test split (set data.test, or data.test_ratio above 0)"
PROVISIONAL = "it stays unread while the answer is PROVISIONAL, because every look at it uses it up"
NO_SCORES = (
    "{metric} is computed over all answers together, so it has no interval. Values are means over seeds "
    "on the validation split, which selected the configurations"
)
NO_FIGURES = "not every arm's winner could be evaluated on it"
UNTUNED = "untuned"
OTHER_EXAMPLES = (
    "the arms have different test examples or tokenizers, so their losses do not compare"
)


def settle(results: StudyResults, finals: Mapping[str, ArmConclusion]) -> StudyResults:
    """Return the results with the finalists' figures and the contrasts on held-out text.

    If `results.untested` already gives a reason against reading the test split, the winners are compared
    with their untuned bases only.
    """
    arms = tuple(
        arm.model_copy(update={"final": finals[arm.name].final}) if arm.name in finals else arm
        for arm in results.arms
    )
    forgotten = [_forgetting(name, final) for name, final in finals.items()]
    forgetting = tuple(found for found in forgotten if found is not None)
    served = [
        each for name, final in finals.items() for each in served_contrasts(name, final.served)
    ]
    settled = results.model_copy(
        update={"arms": arms, "forgetting": forgetting, "served": tuple(served)}
    )
    # General text does not belong to the test split, so its contrasts are kept.
    if results.untested is not None:
        return settled
    compared = [arm for arm in arms if arm.best is not None]
    if any(not arm.facts.rows.get("test", 0) for arm in compared):
        return settled.model_copy(update={"untested": NO_TEST_SPLIT})
    metric = settled.compared_metric
    if metric not in ("eval/loss", *SCORED_METRICS):
        return settled.model_copy(update={"untested": NO_SCORES.format(metric=metric)})
    judged = (finals[arm.name] for arm in compared)
    if not all(final.losses("test") and final.untuned.test is not None for final in judged):
        return settled.model_copy(update={"untested": NO_FIGURES})
    of_recipes = [_recipe_contrast(settled, name, final) for name, final in finals.items()]
    gains = tuple(found for found in of_recipes if found is not None)
    settled = settled.model_copy(update={"recipe_contrasts": gains})
    reference = reference_arm(settled)
    if reference is None:
        return settled
    rivals = [arm.name for arm in compared if arm.name != reference.name]
    contrasts = [_contrast(settled, name, reference.name, finals) for name in rivals]
    found = tuple(each for each in contrasts if each is not None)
    return settled.model_copy(
        update={
            "contrasts": found,
            "untested": OTHER_EXAMPLES if len(found) < len(rivals) else None,
        }
    )


def _forgetting(arm: str, final: ArmConclusion) -> ArmContrast | None:
    """Return the winner's contrast with its base on general text. The difference is its forgetting."""
    tuned, untuned = final.losses("general"), final.untuned.general
    if not tuned or untuned is None:
        return None
    base = example_rows([untuned])
    return contrast((arm, UNTUNED), example_rows(tuned), base, base, split="general text")


def _contrast(
    results: StudyResults, arm: str, reference: str, finals: Mapping[str, ArmConclusion]
) -> ArmContrast | None:
    """Return the contrast of an arm with its reference on the test split.

    Both improvements count from the base in the reference's precision, so that a base that quantization
    made worse does not flatter its arm. The result is None if examples or tokenizers differ.
    """
    metric = results.compared_metric
    # The reference's base is the zero line of both improvements.
    base = finals[reference].untuned.test
    assert base is not None
    one, other = (_judged(finals[name], metric) for name in (arm, reference))
    # Other token counts mean other examples or another tokenizer.
    if not np.array_equal(one.tokens, other.tokens):
        return None
    return contrast(
        (arm, reference),
        one,
        other,
        example_rows([base], metric),
        margin=results.equivalence_margin,
        maximize=results.objective.direction == "maximize",
        fresh=all(finals[name].final.judged for name in (arm, reference)),
        metric=metric,
    )


def _recipe_contrast(results: StudyResults, arm: str, ended: ArmConclusion) -> ArmContrast | None:
    """Return the contrast of an arm's winner with its recipe on the test split, or None without one."""
    recipe, losses, base = ended.final.recipe, ended.recipe_losses, ended.untuned.test
    if recipe is None or not losses or base is None:
        return None
    metric = results.compared_metric
    return contrast(
        (arm, recipe.name),
        _judged(ended, metric),
        # without the spread over other seeds of the arm: the winner's side has it already
        example_rows(losses, metric),
        example_rows([base], metric),
        margin=results.equivalence_margin,
        maximize=results.objective.direction == "maximize",
        fresh=bool(ended.final.judged),
        metric=metric,
    )


def _judged(final: ArmConclusion, metric: str) -> SeedLosses:
    """Return the losses of the winner's seeds, with the spread over the seeds that chose it."""
    # The first seed of a finalist won the search by its luck, so it shows no spread.
    repeats = [finalist.repeats[1:] for finalist in final.final.finalists]
    values = [[each.value for each in found if each.value is not None] for found in repeats]
    further = pooled_spread(values) if final.final.judged else None
    return replace(example_rows(final.losses("test"), metric), further=further)
