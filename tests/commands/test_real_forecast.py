"""The forecast against what then happens, on the embedded base."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from sweeper.commands.dry_run import show_study
from sweeper.commands.run_study import run_study
from sweeper.commands.study_forecast import ArmForecast
from sweeper.search.study_plan import studies


@pytest.mark.slow
def test_trainings_are_exact_and_hours_within_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three LoRA trials and two full ones take what was forecast, give or take 30 %."""
    (plan,) = studies(
        [
            *("+experiment=lr_rank_sweep", "finalists=none", "pruner=none", "tracking=none"),
            *("hydra.sweeper.n_trials=3", "hydra.sweeper.arms.full.n_trials=2"),
            *("hydra.sweeper.n_jobs=1", f"output_dir={tmp_path}"),
        ]
    )
    seconds: list[float] = []
    own = ArmForecast.seconds_with

    def recorded(forecast: ArmForecast, jobs: int) -> float | None:
        found = own(forecast, jobs)
        seconds.append(found or 0.0)
        return found

    monkeypatch.setattr(ArmForecast, "seconds_with", recorded)
    console = Console(file=io.StringIO(), width=160)
    show_study(plan, console)
    assert isinstance(console.file, io.StringIO)
    assert "5 in all: lora 3 in the search; full 2 in the search\n" in console.file.getvalue()
    began = time.monotonic()
    run_study(plan)
    took = time.monotonic() - began
    assert len(list(tmp_path.rglob("outcome.json"))) == 5
    # each arm is asked twice: whether its time is known, and for the sum
    assert took == pytest.approx(sum(seconds) / 2, rel=0.3)
