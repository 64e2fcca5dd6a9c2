"""R20, R22: clocks that are set in the middle of a sweep, and nights that are an hour short or long."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from tests.faults.clock import WallClock
from tests.faults.conftest import Launch
from tests.faults.sweep import Sweep, spool

BERLIN = ZoneInfo("Europe/Berlin")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMITED = (
    *("tracking=none", "hydra.sweeper.n_trials=8", "workers.fake.step_seconds=0.05"),
    *("hydra.sweeper.n_jobs=2", "workers.stall_timeout_s=10", "workers.trial_timeout_s=30"),
    *("budget.wall_clock=30m", "budget.device_hours=0.5"),
)
"""Every limit that goes by time is on, and far enough away for a true clock."""


def _check(sweep: Sweep) -> None:
    """Each result once, in one attempt; no duration that a set clock went into."""
    for trial in sweep.check_each_once(8):
        assert trial.user_attrs["attempt"] == 1
        assert 0.9 < trial.user_attrs["outcome"]["metrics"]["cost/seconds"] < 100


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_by_an_hour_ends_nothing(
    launch: Launch, tmp_path: Path, hours: int
) -> None:
    """In mid-trial, for driver and workers: no false stall, no used-up budget, steps in order."""
    clock = WallClock.build(tmp_path)
    sweep = launch(*LIMITED, environment=clock.environment)
    sweep.until_steps(2)
    clock.set_back_or_forth(hours * 3600)
    sweep.until_ended(4)
    sweep.end()
    _check(sweep)
    before, after = spool(sweep.trial(0))[0]["time"], spool(sweep.trial(7))[-1]["time"]
    assert abs(after - before - hours * 3600) < 600, "the programs lived by the clock that was set"


@pytest.mark.parametrize("moment", ["2026-03-29 01:59:50", "2026-10-25 02:59:50"])
def test_a_sweep_runs_through_a_change_of_summer_time(
    launch: Launch, tmp_path: Path, moment: str
) -> None:
    """Berlin's clocks jump while trials run: attempts, limits and results are as on any other day."""
    clock = WallClock.build(tmp_path)
    starts = datetime.fromisoformat(moment).replace(tzinfo=BERLIN).timestamp()
    clock.set_to(starts)
    slowly = "workers.fake.step_seconds=0.2"  # still at it ten seconds after its start
    sweep = launch(*LIMITED, slowly, environment={**clock.environment, "TZ": "Europe/Berlin"})
    sweep.until_steps(2)
    sweep.end()
    _check(sweep)
    first, last = spool(sweep.trial(0))[0]["time"], spool(sweep.trial(7))[-1]["time"]
    offsets = {datetime.fromtimestamp(each, BERLIN).utcoffset() for each in (starts, last)}
    assert starts <= first < last
    assert len(offsets) == 2, "the change fell into the sweep"
