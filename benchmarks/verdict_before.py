"""How often did the verdict find a gap before three fresh seeds judged the winners?

    python -m benchmarks.verdict_before CHECKOUT_OF_BEFORE     # c705442

The simulated studies are those of verdict_calibration.py. The seeds that chose a winner are judged, as
they were then, and the checkout's own function computes the interval. An arm was ahead if the interval
did not contain zero.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.record import record
from benchmarks.verdict_calibration import GAIN, SEEDS, SimulatedStudy, SimulatedWorld
from sweeper.core.value import FrozenValue

STUDIES = 100
"""Simulated studies for each seed. One takes 0.2 CPU seconds."""
GAPS = (0.03, 0.06)
"""Gaps as shares of the gain."""
PRESETS = {
    "embedded default": SimulatedWorld(top=1, selection_seeds=2, fresh_seeds=2, reuse=True),
    "real": SimulatedWorld(top=2, selection_seeds=3, fresh_seeds=3, reuse=True),
}
"""The presets of finalists at that time."""


def intervals_of(checkout: Path) -> ModuleType:
    """Return the checkout's module of intervals. Of its package it needs one base class only."""
    # The base class of frozen values has another name and place now.
    stub = ModuleType("sweeper.outcome")
    stub.Value = FrozenValue  # type: ignore[attr-defined]
    sys.modules["sweeper.outcome"] = stub
    path = checkout / "sweeper" / "reporting" / "intervals.py"
    spec = importlib.util.spec_from_file_location("intervals_before", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ahead(before: Any, world: SimulatedWorld, seed: int) -> dict[str, float]:
    """Return the share of studies with an arm ahead, for equal arms and for each gap."""
    random = np.random.default_rng(seed)
    ends = []
    for _ in range(STUDIES):
        losses = SimulatedStudy.draw(world, random).judged(random)
        arm, reference, base = (before.Judged(each.nll, each.tokens) for each in losses)
        found = before.contrast(("arm", "reference"), arm, reference, base).difference
        ends.append((found.low, found.high))
    low, high = np.array(ends).T
    # A gap adds the same loss to each token, so it moves every resample and both ends.
    shares = {0.0: "equal arms"} | {gap: f"gap of {100 * gap:g} % of the gain" for gap in GAPS}
    return {
        name: float(np.mean((low + gap * GAIN > 0) | (high + gap * GAIN < 0)))
        for gap, name in shares.items()
    }


def main() -> None:
    """Measure, print and store the figures."""
    before = intervals_of(Path(sys.argv[1]))
    figures = {
        name: {str(seed): ahead(before, world, seed) for seed in SEEDS}
        for name, world in PRESETS.items()
    }
    record("verdict_before", {"studies": STUDIES, "commit of before": "c705442", "ahead": figures})


if __name__ == "__main__":
    main()
