"""Recipes: named known points that come first, as far as an arm can try them as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from sweeper.config.grammar import parse_domain
from sweeper.config.space import Choice, Domain, Interval
from sweeper.core.errors import ConfigError, StudyError, StudyMismatch
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import StudyFolder
from sweeper.nightly.entry_decision import progress
from sweeper.search import study as study_module
from sweeper.search.searched_epochs import FEW_ROWS, mean_epochs, with_few_rows
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import (
    RECIPES,
    first_draws,
    open_storage,
    open_study,
    require_same_settings,
)
from sweeper.search.study_plan import BATCH, EPOCHS, ArmPlan, StudyPlan, studies
from sweeper.workers.fake_runner import FakeRunner

SWEEP = ("+experiment=lr_rank_sweep", "workers=fake", "tracking=none")
REAL = (*SWEEP, "space=real", "training=real")
RATE = "training.learning_rate"
NAMED = (
    "{name: mine, source: a table, commit: null, licence: null, conditions: one seed, "
    "point: {training.learning_rate: 2e-3, adapter.r: 4}}"
)


def _plan(*overrides: str) -> StudyPlan:
    (plan,) = studies(overrides)
    return plan


def _facts(arm: ArmPlan, rows: int = 100) -> ArmBaseline:
    facts = FakeRunner(arm.settings.workers.fake).probe(arm.settings.trial)
    return facts.model_copy(update={"rows": {**facts.rows, "train": rows}})


def test_the_recipes_of_the_real_space_are_whole() -> None:
    """A value for each searched key, the arm's own setting where the recipe names none."""
    lora, full = _plan(*REAL).arms
    assert [recipe.name for recipe in lora.recipes] == ["tulu3_3e-4", "tulu3_1e-3"]
    assert not lora.priors
    for recipe in lora.recipes:
        assert recipe.point.keys() == lora.space.keys()
        assert (recipe.point[EPOCHS], recipe.point[BATCH]) == (1, 4)
    assert lora.recipes[0].point["adapter.alpha_over_r"] == 0.5
    # a rule of thumb is where the search starts, and no recipe that three full fine-tunes are spent on
    assert (full.recipes, full.priors) == ((), ({RATE: 3e-5},))


def test_the_tiny_space_starts_from_the_default_point() -> None:
    """What one trial trains without a search is the recipe, and the grid of the full arm has none."""
    lora, full = _plan(*SWEEP).arms
    (recipe,) = lora.recipes
    settings = lora.settings_at(recipe.point).trial
    assert settings == _plan(*SWEEP).settings.trial
    assert not full.recipes


def test_recipes_come_before_plain_points() -> None:
    """Whatever the order in the list, and both are drawn."""
    overrides = f"hydra.sweeper.priors=[{{training.learning_rate: 1e-3}}, {NAMED}]"
    lora = _plan(*SWEEP, overrides).arms[0]
    assert [recipe.name for recipe in lora.recipes] == ["mine"]
    assert [draw[RATE] for draw in first_draws(lora)] == [2e-3, 1e-3]


@pytest.mark.parametrize("fixed", ["adapter.r=8", "adapter.r=8,16"])
def test_a_part_of_a_recipe_has_no_name(fixed: str) -> None:
    """A key that is fixed to another value, or a value that is not offered: another configuration."""
    lora = _plan(*SWEEP, f"hydra.sweeper.priors=[{NAMED}]", fixed).arms[0]
    assert not lora.recipes
    assert not lora.priors
    assert [draw[RATE] for draw in first_draws(lora)] == [2e-3]


def test_a_fixed_value_that_is_the_recipes_own_leaves_it_a_recipe() -> None:
    """What is trained is what the recipe states."""
    lora = _plan(*SWEEP, f"hydra.sweeper.priors=[{NAMED}]", "adapter.r=4").arms[0]
    assert [recipe.name for recipe in lora.recipes] == ["mine"]


def test_a_recipe_without_an_origin_is_refused() -> None:
    """The message names the missing keys."""
    bare = "hydra.sweeper.priors=[{name: mine, point: {training.learning_rate: 2e-3}}]"
    with pytest.raises(ConfigError, match=r"priors\[0\].source"):
        _plan(*SWEEP, bare)


def test_paper_has_no_recipe_in_any_arm() -> None:
    """Neither arm starts from what is known."""
    plan = _plan(*REAL, "hydra.sweeper.protocol=paper")
    assert [arm.recipes for arm in plan.arms] == [(), ()]
    assert [arm.priors for arm in plan.arms] == [(), ()]


def test_epochs_and_batch_are_searched_in_every_arm_alike() -> None:
    """The same domains, and a value on the command line fixes both arms."""
    lora, full = _plan(*REAL).arms
    assert lora.space[EPOCHS] == full.space[EPOCHS] == Interval(1, 3, integer=True)
    assert lora.space[BATCH] == full.space[BATCH] == Choice((1, 2, 4, 8, 16))
    lora, full = _plan(*REAL, f"{EPOCHS}=2").arms
    for arm in (lora, full):
        assert EPOCHS not in arm.space
        assert arm.settings.training.num_train_epochs == 2
    lora, full = _plan(*REAL, f"{EPOCHS}=1,2").arms
    assert lora.space[EPOCHS] == full.space[EPOCHS] == Choice((1, 2))
    lora, full = _plan(*REAL, "training.max_steps=100").arms
    assert EPOCHS not in {**lora.space, **full.space}


def test_an_arms_own_range_precedes_the_shared_one() -> None:
    """The other arm keeps the shared range."""
    own = f"++hydra.sweeper.arms.full.params={{{EPOCHS}: 'choice(1, 2)'}}"
    lora, full = _plan(*REAL, own).arms
    assert lora.space[EPOCHS] == Interval(1, 3, integer=True)
    assert full.space[EPOCHS] == Choice((1, 2))


def test_devices_that_share_a_batch_leave_out_the_batches_that_they_cannot_share() -> None:
    """Eight devices: 4 examples a step are one for each second device."""
    lora, full = _plan(*REAL, "training.devices_per_trial=8").arms
    assert lora.space[BATCH] == full.space[BATCH] == Choice((2, 4, 8, 16))


def test_tokens_are_equal_only_where_epochs_are_searched() -> None:
    """With one length for all trials, equal trials are the fair budget, unless the user says tokens."""
    assert _plan(*REAL).equal_tokens
    fixed = _plan(*REAL, f"{EPOCHS}=1")
    assert (fixed.equal_tokens, fixed.study.fairness.equal) == (False, "trials")
    given = _plan(*REAL, f"{EPOCHS}=1", "hydra.sweeper.fairness.equal=tokens")
    assert given.study.fairness.equal == "tokens"
    assert _plan(*SWEEP).study.fairness.equal == "trials"


def test_few_rows_raise_the_epochs_unless_they_were_given() -> None:
    """Five epochs below 2,000 rows. The user's own range stays."""
    lora = _plan(*REAL).arms[0]
    few = with_few_rows(lora, FEW_ROWS - 1)
    assert str(few.space[EPOCHS]) == "int(interval(1, 5))"
    assert with_few_rows(lora, FEW_ROWS) is lora
    assert (mean_epochs(lora), mean_epochs(few)) == (2, 3)
    given = _plan(*REAL, f"{EPOCHS}=int(interval(1,2))").arms[0]
    assert with_few_rows(given, 100) is given
    tiny = _plan(*SWEEP).arms[0]
    assert with_few_rows(tiny, 100) is tiny
    assert mean_epochs(tiny) == tiny.settings.training.num_train_epochs
    chosen = _plan(*REAL, f"{EPOCHS}=1,4").arms[0]
    assert mean_epochs(chosen) == 2.5


def _stored(
    tmp_path: Path, plan: StudyPlan, arms: list[ArmPlan], *, earlier: bool = False
) -> tuple[dict[str, optuna.Study], optuna.storages.BaseStorage]:
    """The stored studies of arms. Those of an earlier version know no recipes."""
    storage = open_storage(None, StudyFolder(tmp_path / plan.study.study_name))
    with pytest.MonkeyPatch.context() as patch:
        if earlier:
            patch.setattr(study_module, "_fix_recipes", lambda study, arm: None)
        found = {arm.name: open_study(plan, arm, _facts(arm), storage, "uuid") for arm in arms}
    return found, storage


def _domain(key: str, words: str) -> Domain:
    """A domain in the words of a search space."""
    found = parse_domain(key, words)
    assert isinstance(found, Choice | Interval)
    return found


def _as_before(plan: StudyPlan) -> list[ArmPlan]:
    """The arms of the real space before epochs and batch were searched."""
    lora, full = plan.arms
    ratio = "adapter.alpha_over_r"
    spaces = [
        {key: domain for key, domain in arm.space.items() if key not in (EPOCHS, BATCH)}
        for arm in (lora, full)
    ]
    spaces[0] = {**spaces[0], ratio: _domain(ratio, "choice(1, 2, 4)")}
    spaces[1] = {RATE: _domain(RATE, "choice(3e-6, 8.6e-6, 2.4e-5, 7e-5, 2e-4)")}
    return [
        replace(arm, space=space, recipes=())
        for arm, space in zip((lora, full), spaces, strict=True)
    ]


def test_a_stored_study_keeps_its_space_and_has_no_recipes(tmp_path: Path) -> None:
    """The command of before resumes both arms of before, and says what they keep."""
    plan = _plan(*REAL, f"output_dir={tmp_path}")
    before = _as_before(plan)
    stored, storage = _stored(tmp_path, plan, before, earlier=True)
    kept, notes = with_stored_defaults(plan, stored, storage)
    assert [arm.space for arm in kept.arms] == [arm.space for arm in before]
    assert [arm.recipes for arm in kept.arms] == [(), ()]
    assert kept.arms[1].sampler.name == "grid"
    assert kept.arms[1].n_trials == 5
    for arm in kept.arms:
        require_same_settings(stored[arm.name], kept, arm)
    assert any("adapter.alpha_over_r=choice(1, 2, 4)" in note for note in notes)
    assert progress(plan).missing == 12 + 5, "a night counts the trials that the study has"
    assert not kept.equal_tokens


def test_a_domain_of_the_users_own_is_another_question(tmp_path: Path) -> None:
    """A default that has changed is kept, a changed command is not."""
    plan = _plan(*REAL, f"output_dir={tmp_path}")
    stored, storage = _stored(tmp_path, plan, _as_before(plan), earlier=True)
    other = _plan(*REAL, f"output_dir={tmp_path}", "adapter.alpha_over_r=1,8")
    kept, _ = with_stored_defaults(other, stored, storage)
    with pytest.raises(StudyMismatch, match="alpha_over_r"):
        require_same_settings(stored["lora"], kept, kept.arms[0])


def test_a_study_keeps_the_recipes_that_it_began_with(tmp_path: Path) -> None:
    """Others of a later command are not tried, and none is compared that came later."""
    plan = _plan(*SWEEP, f"output_dir={tmp_path}", f"hydra.sweeper.priors=[{NAMED}]")
    stored, storage = _stored(tmp_path, plan, list(plan.arms))
    later = _plan(*SWEEP, f"output_dir={tmp_path}")
    kept, _ = with_stored_defaults(later, stored, storage)
    assert kept.arms[0].recipes == plan.arms[0].recipes
    assert stored["lora"].user_attrs[RECIPES][0]["name"] == "mine"


def test_few_rows_are_kept_by_a_stored_study(tmp_path: Path) -> None:
    """The plan does not know the rows, and the stored range is no other question."""
    plan = _plan(*REAL, f"output_dir={tmp_path}")
    few = [with_few_rows(arm, 100) for arm in plan.arms]
    stored, storage = _stored(tmp_path, plan, few)
    kept, _ = with_stored_defaults(plan, stored, storage)
    assert [arm.space for arm in kept.arms] == [arm.space for arm in few]
    assert kept.equal_tokens


def test_a_study_of_an_earlier_version_gets_no_part_of_a_recipe(tmp_path: Path) -> None:
    """Its rank is fixed, so of today's recipes it would try the rates. One of today does."""
    plan = _plan(*REAL, f"output_dir={tmp_path}", "adapter.r=8")
    parts = plan.arms[0].recipe_parts
    assert [part[RATE] for part in parts] == [3e-4, 1e-3]
    for name, earlier, wanted in (("then", True, ()), ("now", False, parts)):
        stored, storage = _stored(tmp_path / name, plan, list(plan.arms), earlier=earlier)
        kept, _ = with_stored_defaults(plan, stored, storage)
        assert kept.arms[0].recipe_parts == wanted


def test_damaged_recipes_are_a_damaged_database(tmp_path: Path) -> None:
    """The attribute is named with the ways out."""
    plan = _plan(*SWEEP, f"output_dir={tmp_path}")
    lora = plan.arms[0]
    stored, storage = _stored(tmp_path, plan, [lora])
    stored["lora"].set_user_attr(RECIPES, [{"name": "mine", "point": 3}])
    with pytest.raises(StudyError, match=r"damaged.*recipes: .*source"):
        open_study(plan, lora, _facts(lora), storage, "uuid")
