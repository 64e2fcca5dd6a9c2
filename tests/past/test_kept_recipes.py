"""A study of the past gets no recipe of today, and is answered as it was."""

from __future__ import annotations

from pathlib import Path

from sweeper.core.paths import StudyFolder
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import find_study, open_storage
from sweeper.search.study_plan import studies
from tests.past.past import FINISHED


def test_a_study_of_the_past_has_no_recipe(past: Path) -> None:
    """Today's plan has one, and the plan with the stored study has none."""
    (plan,) = studies(FINISHED)
    assert plan.arms[0].recipes
    storage = open_storage(None, StudyFolder(Path("outputs/finished")))
    found = {arm.name: find_study(plan, arm, storage) for arm in plan.arms}
    stored = {name: study for name, study in found.items() if study is not None}
    assert len(stored) == 2
    kept, _ = with_stored_defaults(plan, stored, storage)
    assert [arm.recipes for arm in kept.arms] == [(), ()]
    assert kept.recipe_seeds_at_most(kept.arms[0]) == 0
