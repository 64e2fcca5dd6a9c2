"""A search's trial as a job, turned by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sweeper.driver.arm_search import ArmSearch
from sweeper.driver.budget import ArmBudget
from sweeper.driver.running_trial import RunningTrial, WorkTimer
from sweeper.driver.trial_sizes import KnownSizes
from sweeper.reporting.study_progress import TrialProgress
from tests.driver.test_budget import FakeClock


@pytest.mark.parametrize("paused", [True, False])
def test_the_work_of_every_attempt_counts_and_the_wait_for_a_worker_does_not(paused: bool) -> None:
    """An hour, a pause or a loss, ten minutes in the queue, half an hour: 90 minutes of a device."""
    clock = FakeClock(5.0)
    prepared: Any = SimpleNamespace(view=TrialProgress("lora/0000", "lora", 0, {}))
    context: Any = None
    job = RunningTrial(context, prepared, KnownSizes(), WorkTimer(clock))
    job.timer.start()
    clock.now += 3600
    job.on_requeued(paused=paused)
    clock.now += 600
    assert job.timer.seconds == 3600
    job.timer.start()
    clock.now += 1800
    assert job.timer.seconds == 5400


def test_a_trial_that_waits_in_a_pause_keeps_its_share_of_the_budget() -> None:
    """Ten device-hours, one of them used by a trial that is paused now: nine are left."""
    clock = FakeClock(5.0)
    prepared: Any = SimpleNamespace(view=TrialProgress("lora/0000", "lora", 0, {}))
    context: Any = SimpleNamespace(budget=ArmBudget(None, 36000.0, None, clock=clock))
    search = ArmSearch(context, lambda: 1, lambda: None)
    job = RunningTrial(context, prepared, KnownSizes(), WorkTimer(clock))
    search._open["lora/0000"] = job
    assert search.budget_left == "10.00 device-hours left"
    job.timer.start()
    clock.now += 3600
    job.on_requeued(paused=True)
    clock.now += 600
    assert search.budget_left == "9.00 device-hours left"
