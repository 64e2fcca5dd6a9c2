"""The expected best of a smaller search, and the sentences about how the arms were searched."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from sweeper.reporting.best_of_n import best_of_n, expected_best
from sweeper.reporting.results import StudyResults
from sweeper.reporting.verdict import judge
from tests.reporting.studies import LOSS, ROUGE, make_arm, make_results, make_trial


@pytest.mark.parametrize(("objective", "best"), [(LOSS, min), (ROUGE, max)])
def test_expectation_is_the_mean_over_all_choices(objective: object, best: object) -> None:
    """Against the enumeration of every choice of n among seven values."""
    values = [random.Random(3).gauss(4, 0.1) for _ in range(7)]
    for count in range(1, 8):
        chosen = [best(each) for each in itertools.combinations(values, count)]  # type: ignore[operator]
        found = expected_best(values, count, objective)  # type: ignore[arg-type]
        assert found == pytest.approx(statistics.fmean(chosen))
    with pytest.raises(ValueError, match="the best of 8 of 7"):
        expected_best(values, 8, LOSS)


def _study(priors: int | None = 2) -> StudyResults:
    lora = [make_trial("lora", n, "finished", 4.0 + 0.01 * n) for n in range(5)]
    lora.append(make_trial("lora", 5, "pruned", 4.3))
    full = [make_trial("full", n, "finished", 3.9 + 0.1 * n) for n in range(3)]
    arms = [
        make_arm("lora", lora).model_copy(update={"priors": priors}),
        make_arm("full", full, "full fine-tuning").model_copy(update={"priors": 0, "refined": 1}),
    ]
    return make_results(*arms, pruner="median")


def test_the_verdict_says_how_each_arm_was_searched() -> None:
    """Trials, priors, stops and points beside the grid of each arm, and the best of equal numbers."""
    words = judge(_study()).words
    assert (
        "Search: QLoRA 6 trials (2 priors, 1 pruned); full fine-tuning 3 trials (no prior, 1 beside "
        "the best of its grid). Pruner: median." in words
    )
    values = [4.0, 4.01, 4.02, 4.03, 4.04, 4.3]
    mean = statistics.fmean(min(each) for each in itertools.combinations(values, 3))
    assert f"of 3 of the 6 trials of QLoRA is {mean:.4f}, against 3.9000 of full" in words


def test_results_of_before_say_nothing_about_priors() -> None:
    """Where the number of priors was not stored, no sentence claims that there were none."""
    assert "prior" not in judge(_study(priors=None)).words


def test_a_curve_begins_with_the_mean_and_ends_with_the_best() -> None:
    """One trial is worth the mean of all, and all trials are worth the best."""
    arm = _study().arms[0]
    curve = best_of_n(arm)
    assert curve[0] == (1.0, pytest.approx(statistics.fmean([4.0, 4.01, 4.02, 4.03, 4.04, 4.3])))
    assert curve[-1] == (6.0, pytest.approx(4.0))
    assert len(best_of_n(arm, most=2)) == 2


def test_the_verdict_names_the_recipes_that_came_first() -> None:
    """A known point with an origin is named, and plain points are counted."""
    results = _study()
    lora = results.arms[0].model_copy(update={"recipes": ("one",)})
    words = judge(results.model_copy(update={"arms": (lora, results.arms[1])})).words
    assert "QLoRA 6 trials (2 priors: among them the recipe one, 1 pruned)" in words
    lora = results.arms[0].model_copy(update={"recipes": ("one", "two")})
    words = judge(results.model_copy(update={"arms": (lora, results.arms[1])})).words
    assert "QLoRA 6 trials (2 priors: the recipes one and two, 1 pruned)" in words
