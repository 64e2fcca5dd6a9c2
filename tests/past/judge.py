"""A judge of challengers and champions whose losses are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sweeper.nightly.challenge import GateFigures
from tests.past.past import GATE_LOSSES


def judge(gate: str, trials: dict[str, Path]) -> GateFigures:
    """100 examples of 10 tokens, as difficult for one model as for another."""
    hard = np.random.default_rng(0).normal(0, 1, 100)
    names = ["base", *trials]
    nll = {name: list(10 * GATE_LOSSES[name] + hard) for name in names}
    general = {name: [36.0] * 8 for name in names}
    return GateFigures(tokens=[10] * 100, nll=nll, general_tokens=[10] * 8, general=general)
