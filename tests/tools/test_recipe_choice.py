"""The recipes of the real space are what their table says."""

from __future__ import annotations

import pytest

from benchmarks.recipe_choice import SMALL, choose, mean_regret, read_table, with_large_ranks
from sweeper.search.study_plan import studies


def test_the_presets_recipes_are_the_chosen_points() -> None:
    """Rates and rank, in this order, with the table's alpha of 32."""
    (plan,) = studies(["+experiment=lr_rank_sweep", "workers=fake", "space=real"])
    points = [recipe.point for recipe in plan.arms[0].recipes]
    found = [(point["training.learning_rate"], point["adapter.r"]) for point in points]
    assert found == choose(with_large_ranks(read_table()))
    for point in points:
        rank, ratio = point["adapter.r"], point["adapter.alpha_over_r"]
        assert isinstance(rank, int)
        assert isinstance(ratio, float)
        assert rank * ratio == 32


def test_the_figures_beside_the_recipes_are_the_tables() -> None:
    """Mean regrets in nats, of all models with large ranks and of those up to 8B."""
    table = read_table()
    large = with_large_ranks(table)
    small = {model: cells for model, cells in large.items() if model in SMALL}
    assert (len(table), len(large), len(small)) == (35, 22, 8)
    first, second = choose(large)
    assert mean_regret(large, [first]) == pytest.approx(0.0028, abs=5e-4)
    assert mean_regret(large, [first, second]) == pytest.approx(0.0005, abs=1e-4)
    assert mean_regret(small, [first]) == pytest.approx(0.0065, abs=1e-4)
    assert mean_regret(small, [second]) == pytest.approx(0.0019, abs=1e-4)
    assert mean_regret(small, [first, second]) == pytest.approx(0.0012, abs=1e-4)
