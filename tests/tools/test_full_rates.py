"""Searches of one rate, replayed on a curve made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.full_rates import grids, nearest, refined, sampled, smooth, summarise

LOGS = np.linspace(-4.5, -2.0, 24)
BEST = -3.17
VALUES = 3.5 + 0.2 * (LOGS - BEST) ** 2


def test_a_parabola_is_its_own_smooth_curve() -> None:
    """The luck of one rate is spread over seven of them."""
    assert smooth(LOGS, VALUES) == pytest.approx(VALUES)
    lucky = VALUES.copy()
    lucky[12] -= 0.07
    assert 0 < (VALUES - smooth(LOGS, lucky))[12] < 0.035


def test_points_beside_a_grid_lie_half_way_to_its_neighbours() -> None:
    """The best of half decades is at most a quarter of a decade off, and then an eighth."""
    for grid in grids(LOGS, 5, 0.5):
        more = refined(LOGS, VALUES, grid)
        assert len(more) <= 7
        before, after = (min(VALUES[index] for index in each) for each in (grid, more))
        assert after <= before
    # the last grid has its best point at an end, so that it has one neighbour
    assert len(refined(LOGS, VALUES, [nearest(LOGS, each) for each in (-3.1, -2.6, -2.1)])) == 4


def test_the_sampler_tries_recorded_rates() -> None:
    """Seven trials by the product's own sampler come near the best rate."""
    tried = sampled(LOGS, VALUES, seed=1)
    assert len(tried) == 7
    assert min(VALUES[index] for index in tried) < 3.5 + 0.2 * 0.25**2


def test_the_regret_is_that_of_the_best_looking_rate() -> None:
    """Luck that chooses a rate does not make it good."""
    values = VALUES.copy()
    values[0] = 3.0
    found = summarise(values, VALUES, [[0, 12], [12, 12]])
    assert found["worst regret"] == pytest.approx(VALUES[0] - VALUES.min(), abs=1e-5)
    assert found["trials"] == 1.5
