"""The smallest gap between two arms that a study can show, before anything is trained.

Only the numbers of test rows and of fresh seeds are known then. The spreads are those that the committed
study experiments/lr_rank_sweep measured, so a user's own may be larger or smaller.
"""

from __future__ import annotations

import numpy as np

from sweeper.reporting.arm_comparison import FEWEST_SEEDS, visible_reach
from sweeper.reporting.intervals import LEVEL, POWER, JointMeans, SeedSpread
from sweeper.reporting.text_table import perplexity_factor

ROW_SPREAD = 0.09
"""Standard deviation over rows of the difference of two arms, in nats per target token. Measured: 0.088
over 321 test rows."""
SEED_SPREAD = 0.004
"""Standard deviation of a loss over seeds, in nats per target token. Measured: 0.0035 and 0.0047 over
three seeds."""


def smallest_gap(rows: int, seeds: int, comparisons: int = 1) -> float | None:
    """Return the gap in nats per token that 80 of 100 studies find, or None if none can be shown.

    Args:
        rows: rows of the test split.
        seeds: fresh seeds of each arm.
        comparisons: arms that are compared with the reference and winners that are compared with a
            recipe, by which the strictest level is divided.
    """
    if rows < 2 or seeds < FEWEST_SEEDS:
        return None
    # Only the variance of the difference is assumed, so all of the rows' part stands with the first arm
    of_rows = np.array([[ROW_SPREAD**2 / rows, 0.0], [0.0, 0.0]])
    of_seeds = SeedSpread(SEED_SPREAD**2 / seeds, seeds - 1)
    joint = JointMeans(np.zeros(2), of_rows, rows - 1, (of_seeds, of_seeds))
    difference = joint.combined(1, -1)
    return difference.error * visible_reach((1 - LEVEL) / comparisons, difference.freedom)


def gap_line(rows: int, seeds: int, comparisons: int = 1) -> str:
    """Return the smallest gap with what it assumes, for a forecast."""
    gap = smallest_gap(rows, seeds, comparisons)
    judged = f"{rows:,} test rows and {seeds} fresh seeds of each arm"
    if gap is None:
        least = f"It takes 2 rows and {FEWEST_SEEDS} seeds at least"
        return f"gap:        no gap between arms can be shown with {judged}. {least}"
    return (
        f"gap:        {gap:.4f} nats per token ({perplexity_factor(gap)}) between arms is the "
        f"smallest that {100 * POWER:.0f} of 100 such studies find, with {judged} (assumed: a row's "
        f"difference spreads by {ROW_SPREAD:g} nats and a seed by {SEED_SPREAD:g}, "
        "as measured on the embedded base)"
    )
