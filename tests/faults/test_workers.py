"""R1, R4: workers that are killed or frozen, at random moments and at the worst ones."""

from __future__ import annotations

import random
import signal
import time

import pytest

from sweeper.search.states import MAX_ATTEMPTS
from tests.faults.conftest import Launch
from tests.faults.sweep import Sweep, spool

KILLS = 20


def test_a_killed_worker_costs_one_attempt_and_no_step(launch: Launch) -> None:
    """kill -9 in mid-trial: the second attempt goes on where the first was; every trial ends once."""
    sweep = launch("tracking=none", "hydra.sweeper.n_trials=3", "workers.fake.step_seconds=0.05")
    sweep.until_steps(1, lines=2)
    before = spool(sweep.trial(1))
    sweep.workers()[0].kill()
    sweep.end()
    trials = sweep.check_each_once(3)
    assert [trial.user_attrs["attempt"] for trial in trials] == [1, 2, 1]
    assert spool(sweep.trial(1))[: len(before)] == before, "what was measured before is kept"


def _kill_one(sweep: Sweep, draw: random.Random) -> bool:
    """Kill a worker at a moment that no trial under way may be lost for good; False: none is left."""

    def allowed() -> bool:
        attempts = sweep.attempts().values()
        spare = all(attempt < MAX_ATTEMPTS for attempt in attempts)
        return sweep.process.poll() is not None or (bool(sweep.workers()) and spare)

    deadline = time.monotonic() + 120
    while not allowed():
        assert time.monotonic() < deadline, sweep.output
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.7))  # in its imports, between claim and first step, anywhere
    if not allowed() or sweep.process.poll() is not None:
        return False
    draw.choice(sweep.workers()).kill()
    return True


@pytest.mark.slow
def test_twenty_kills_of_workers_lose_nothing(launch: Launch) -> None:
    """At random moments, imports and the first step included: 16 results, each once, none RUNNING."""
    draw = random.Random(1)
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=16", "hydra.sweeper.n_jobs=2"),
        "workers.fake.step_seconds=0.06",
    )
    sweep.until(sweep.attempts, "the first trial began")
    kills = 0
    while kills < KILLS and sweep.process.poll() is None:
        kills += _kill_one(sweep, draw)
    sweep.end()
    assert kills == KILLS
    attempts = [trial.user_attrs["attempt"] for trial in sweep.check_each_once(16)]
    assert sum(attempts) - len(attempts) >= KILLS // 3, "kills met trials, not only idle workers"


def test_a_frozen_worker_is_replaced_and_never_heard_again(launch: Launch) -> None:
    """SIGSTOP beyond the stall limit: the worker is dead before its trial starts anew elsewhere."""
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=3", "workers.stall_timeout_s=2"),
        "workers.fake.step_seconds=0.05",
    )
    sweep.until_steps(1)
    (frozen,) = sweep.workers()
    frozen.suspend()
    sweep.until(lambda: 2 in sweep.attempts().values(), "a second attempt began")
    assert not frozen.is_running(), "it could wake up and write"
    output = sweep.end()
    assert "workers.stall_timeout_s" in output
    assert [trial.user_attrs["attempt"] for trial in sweep.check_each_once(3)] == [1, 2, 1]


@pytest.mark.slow
def test_a_short_freeze_costs_nothing(launch: Launch) -> None:
    """SIGSTOP and SIGCONT within the limit, worker and driver: no further attempt, nobody is killed."""
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=4", "workers.stall_timeout_s=8"),
        "workers.fake.step_seconds=0.05",
    )
    sweep.until_steps(1)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        sweep.workers()[0].send_signal(number)
        time.sleep(1)
    sweep.until_steps(2)
    sweep.process.send_signal(signal.SIGSTOP)  # the driver, for longer than the limit
    time.sleep(10)
    sweep.process.send_signal(signal.SIGCONT)
    sweep.end()
    assert {trial.user_attrs["attempt"] for trial in sweep.check_each_once(4)} == {1}
