"""The winner of a search against the arm's recipe, in whole sessions with a fake trainer.

The fake trainer's loss of LoRA is lowest at a learning rate of 5e-3, and falls with the rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.commands.run_study import run_study
from sweeper.core.paths import StudyFolder
from sweeper.reporting.results import StudyResults, load_results
from sweeper.reporting.verdict import judge
from sweeper.reporting.winner import find_winner
from sweeper.search.study_plan import studies

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "pruner=none"),
    *("workers.fake.step_seconds=0.0", "tracking=none", "hydra.sweeper.n_trials=5"),
)
ONLY_LORA = "~hydra.sweeper.arms.full"
BEST = "{training.learning_rate: 5e-3, adapter.r: 32}"
"""No point of the space is better."""


def _known(rate: float, rank: int, name: str = "known") -> str:
    """A recipe in Hydra's words."""
    return (
        f"{{name: {name}, source: a table, commit: abc, licence: null, conditions: one seed, "
        f"point: {{training.learning_rate: {rate}, adapter.r: {rank}}}}}"
    )


def _run(tmp_path: Path, *priors: str, more: tuple[str, ...] = (ONLY_LORA,)) -> StudyResults:
    points = f"hydra.sweeper.priors=[{', '.join(priors)}]"
    (plan,) = studies([*FAKE, points, f"output_dir={tmp_path}", *more])
    return run_study(plan)


def _trained(tmp_path: Path, arm: str = "lora") -> list[str]:
    folder = tmp_path / "lr_rank_sweep" / arm / "finalists"
    return sorted(path.parent.name for path in folder.glob("*/outcome.json"))


def test_a_search_that_finds_a_better_point_says_how_much_it_gained(tmp_path: Path) -> None:
    """Planted: 0.07 nats below the recipe. Both get fresh seeds and are judged on the test split."""
    results = _run(tmp_path, _known(1e-3, 32), BEST)
    final = results.arms[0].final
    assert final is not None
    assert final.recipe is not None
    assert (final.recipe.name, final.recipe.number, final.winner) == ("known", 0, 1)
    assert _trained(tmp_path) == [f"trial_000{n}_seed_{seed}" for n in (0, 1) for seed in (1, 2, 3)]
    (found,) = results.recipe_contrasts
    assert (found.arm, found.reference, found.split, found.seeds) == (
        "lora",
        "known",
        "test",
        (3, 3),
    )
    assert found.losses[0] == pytest.approx(final.test_loss)
    known = final.recipe.test_losses.values()
    assert found.losses[1] == pytest.approx(sum(known) / len(known))
    assert found.difference.value == pytest.approx(-0.082, abs=0.01)
    verdict = judge(results)
    (gain,) = verdict.recipes
    assert gain.outcome == "gained"
    assert "The search of QLoRA gained 0.0" in verdict.words
    assert "Source of known: a table at abc." in verdict.words
    assert verdict.look == 1
    winner = find_winner(results, StudyFolder(tmp_path / "lr_rank_sweep"))
    assert "The search of QLoRA gained 0.0" in winner.gain
    report = (tmp_path / "lr_rank_sweep" / "report.md").read_text()
    assert "The search of QLoRA gained 0.0" in report


def test_a_recipe_that_wins_is_not_trained_twice(tmp_path: Path) -> None:
    """The winner's fresh seeds are its own, and the verdict says that the recipe was enough."""
    results = _run(tmp_path, _known(5e-3, 32))
    final = results.arms[0].final
    assert final is not None
    assert final.recipe is not None
    assert final.recipe.number == final.winner == 0
    assert final.recipe.judged == ()
    assert len(_trained(tmp_path)) == 3
    assert results.recipe_contrasts == ()
    words = judge(results).words
    assert "The recipe was enough: the search of QLoRA found no better point than known." in words


@pytest.mark.slow
def test_a_recipe_within_the_margin_was_enough(tmp_path: Path) -> None:
    """The winner is 0.006 nats better, and the margin of equivalence is 0.1."""
    margin = "hydra.sweeper.verdict.equivalence_margin=0.1"
    results = _run(tmp_path, _known(5e-3, 16), BEST, more=(ONLY_LORA, margin))
    (gain,) = judge(results).recipes
    assert gain.comparison is not None
    assert gain.outcome == "enough"
    assert "The recipe was enough: the winner of QLoRA and the recipe known are equivalent" in (
        judge(results).words
    )


@pytest.mark.slow
def test_the_best_of_several_recipes_is_compared(tmp_path: Path) -> None:
    """By its value on the validation split, like a winner."""
    results = _run(tmp_path, _known(1e-3, 8, "first"), _known(3e-3, 8, "second"), BEST)
    final = results.arms[0].final
    assert final is not None
    assert final.recipe is not None
    assert final.recipe.name == "second"


def test_the_same_command_trains_no_recipe_again(tmp_path: Path) -> None:
    """Outcomes and judgements on disk are read, and the contrast is the same."""
    first = _run(tmp_path, _known(1e-3, 32), BEST)
    files = list((tmp_path / "lr_rank_sweep").rglob("finalists/**/*.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    second = _run(tmp_path, _known(1e-3, 32), BEST)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    stored = load_results("lr_rank_sweep", tmp_path)
    assert first.recipe_contrasts == second.recipe_contrasts == stored.recipe_contrasts
    assert judge(stored).words == judge(second).words


@pytest.mark.slow
def test_a_recipe_of_a_later_command_is_not_tried(tmp_path: Path) -> None:
    """The study keeps the recipe that it began with, also when it is extended."""
    _run(tmp_path, _known(1e-3, 32), BEST)
    extended = (ONLY_LORA, "hydra.sweeper.n_trials=6")
    results = _run(tmp_path, _known(4e-3, 32, "later"), BEST, more=extended)
    (arm,) = results.arms
    assert arm.recipes == ("known",)
    assert 4e-3 not in [trial.params["training.learning_rate"] for trial in arm.trials]
    assert arm.final is not None
    assert arm.final.recipe is not None
    assert arm.final.recipe.name == "known"


@pytest.mark.slow
def test_an_infeasible_recipe_is_not_compared(tmp_path: Path) -> None:
    """It has no value of its own, and nothing more is trained."""
    results = _run(
        tmp_path, _known(1e-3, 32), BEST, more=(ONLY_LORA, "++workers.fake.plan={0: oom}")
    )
    final = results.arms[0].final
    assert final is not None
    assert final.recipe is None
    assert len(_trained(tmp_path)) == 3
    assert judge(results).recipes == ()


def test_a_provisional_answer_compares_on_validation_alone(tmp_path: Path) -> None:
    """The test split stays unread, so the recipe is not trained again, and nothing is claimed."""
    results = _run(
        tmp_path, _known(1e-3, 32), BEST, more=(ONLY_LORA, "hydra.sweeper.fairness.min_finished=9")
    )
    assert results.recipe_contrasts == ()
    (gain,) = judge(results).recipes
    assert gain.outcome == "undecided"
    assert gain.comparison is not None
    assert gain.comparison.split == "validation"
    assert "no confidence interval rules out chance" in judge(results).words
    assert len(_trained(tmp_path)) == 3
    extended = (ONLY_LORA, "hydra.sweeper.fairness.min_finished=5")
    settled = _run(tmp_path, _known(1e-3, 32), BEST, more=extended)
    assert [gain.outcome for gain in judge(settled).recipes] == ["gained"]
    assert len(_trained(tmp_path)) == 6


@pytest.mark.slow
def test_a_recipe_that_wins_a_provisional_study_was_not_enough_yet(tmp_path: Path) -> None:
    """A larger search may still find a better point."""
    small = "hydra.sweeper.fairness.min_finished=9"
    verdict = judge(_run(tmp_path, _known(5e-3, 32), more=(ONLY_LORA, small)))
    assert verdict.provisional
    assert [gain.outcome for gain in verdict.recipes] == ["undecided"]
    assert (
        "So far the search of QLoRA found no better point than the recipe known." in verdict.words
    )
    assert "enough" not in verdict.headline


def test_a_test_split_that_stays_unread_costs_no_training_of_the_recipe(tmp_path: Path) -> None:
    """What is not judged is not trained, and the forecast does not count it."""
    unread = (ONLY_LORA, "hydra.sweeper.finalists.test=false")
    results = _run(tmp_path, _known(1e-3, 32), BEST, more=unread)
    assert len(_trained(tmp_path)) == 3
    assert [gain.outcome for gain in judge(results).recipes] == ["undecided"]
    (plan,) = studies([*FAKE, *unread])
    assert plan.arms[0].recipes
    assert plan.recipe_seeds_at_most(plan.arms[0]) == 0


@pytest.mark.slow
def test_seeds_of_a_recipe_that_diverge_are_counted(tmp_path: Path) -> None:
    """A recipe that is unstable is no better than its figures say."""
    seeds = "++workers.fake.finalists={trial_0000_seed_1: diverge}"
    results = _run(tmp_path, _known(1e-3, 32), BEST, more=(ONLY_LORA, seeds))
    words = judge(results).words
    assert "The recipe known is unstable: 1 of 3 seeds diverged." in words
    assert "3 and 2 fresh seeds" in words


def _with_p_value(results: StudyResults, value: float) -> StudyResults:
    """The same study with this p value of the comparison with the recipe, and none of arms decided."""
    close = {"p_value": value, "equivalence_p": 1.0}
    open_ = {"p_value": 0.9, "equivalence_p": 1.0}
    return results.model_copy(
        update={
            "recipe_contrasts": tuple(
                each.model_copy(update=close) for each in results.recipe_contrasts
            ),
            "contrasts": tuple(each.model_copy(update=open_) for each in results.contrasts),
        }
    )


@pytest.mark.slow
def test_arms_and_recipes_are_one_family(tmp_path: Path) -> None:
    """A p value of 0.03 decides alone at the level of 0.045, and not beside the comparison of arms."""
    both = _run(tmp_path / "both", _known(1e-3, 32), BEST, more=())
    assert (len(both.contrasts), len(both.recipe_contrasts)) == (1, 1)
    (gain,) = judge(_with_p_value(both, 0.03)).recipes
    assert gain.outcome == "undecided"
    alone = _run(tmp_path / "alone", _known(1e-3, 32), BEST)
    (gain,) = judge(_with_p_value(alone, 0.03)).recipes
    assert gain.outcome == "gained"
    assert gain.comparison is not None
    assert gain.comparison.evidence.level == 0.045
