"""The arms' winners on unseen texts: the test split against each other, general text against the base.

Makes contrasts of what the finalists were judged to lose; knows no study and no worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sweeper.core.outcome import ExampleLosses
from sweeper.reporting.finalist_results import ArmConclusion
from sweeper.reporting.intervals import ArmContrast, SeedLosses, contrast
from sweeper.reporting.results import StudyResults
from sweeper.reporting.verdict import reference_arm

SWITCHED_OFF = "finalists.top=0"
LEFT_ALONE = "finalists.test=false leaves it unread"
NOT_ENDED = "the study has not come to its end"
NO_TEST_SPLIT = "the data have none (set data.test, or data.test_ratio above 0)"
NO_FIGURES = "not every arm's winner could be judged on it"
UNTUNED = "untuned"
OTHER_EXAMPLES = "the arms do not share its examples and their tokens"


def settle(results: StudyResults, finals: Mapping[str, ArmConclusion]) -> StudyResults:
    """Results with the finalists' figures, and every arm against its reference on the test split.

    Where `results.untested` says why nobody may read it, they are held against their bases alone.
    """
    arms = tuple(
        replace(arm, final=finals[arm.name].final) if arm.name in finals else arm
        for arm in results.arms
    )
    forgotten = [_forgotten(name, final) for name, final in finals.items()]
    forgetting = tuple(found for found in forgotten if found is not None)
    settled = replace(results, arms=arms, forgetting=forgetting)
    if results.untested is not None:
        return settled
    compared = [arm for arm in arms if arm.best is not None]
    if any(not arm.facts.rows.get("test", 0) for arm in compared):
        return replace(settled, untested=NO_TEST_SPLIT)
    judged = (finals[arm.name] for arm in compared)
    if not all(final.losses("test") and final.untuned.test is not None for final in judged):
        return replace(settled, untested=NO_FIGURES)
    reference = reference_arm(settled)
    if reference is None:
        return settled
    rivals = [arm.name for arm in compared if arm.name != reference.name]
    contrasts = [_contrast(name, reference.name, finals) for name in rivals]
    found = tuple(each for each in contrasts if each is not None)
    return replace(
        settled,
        contrasts=found,
        untested=OTHER_EXAMPLES if len(found) < len(rivals) else None,
    )


def _forgotten(arm: str, final: ArmConclusion) -> ArmContrast | None:
    """The winner against its own base on general text: the difference is what it forgot."""
    tuned, untuned = final.losses("general"), final.untuned.general
    if not tuned or untuned is None:
        return None
    base = _rows([untuned])
    return contrast((arm, UNTUNED), _rows(tuned), base, base, split="general text")


def _contrast(arm: str, reference: str, finals: Mapping[str, ArmConclusion]) -> ArmContrast | None:
    """Both against the base as the reference holds it, which is one zero line for both.

    None if they were judged on different examples, or by different tokenizers.
    """
    base = finals[reference].untuned.test
    assert base is not None
    one, other = _judged(finals[arm]), _judged(finals[reference])
    if not np.array_equal(one.tokens, other.tokens):
        return None
    return contrast((arm, reference), one, other, _rows([base]))


def _judged(final: ArmConclusion) -> SeedLosses:
    return _rows(final.losses("test"))


def _rows(seeds: Sequence[ExampleLosses]) -> SeedLosses:
    """The seeds of one configuration, a row each."""
    return SeedLosses(
        np.array([examples.nll for examples in seeds], dtype=np.float64),
        np.array(seeds[0].tokens, dtype=np.float64),
    )
