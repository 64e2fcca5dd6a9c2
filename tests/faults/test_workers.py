"""R1, R4, R12, R18: workers that are killed, frozen, out of memory; trials that kill every worker."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from sweeper.driver.jobs import MAX_ATTEMPTS
from tests.faults.conftest import Launch
from tests.faults.sweep import EVALUATED, Sweep, spool

pytestmark = pytest.mark.timeout(900)
KILLS = 20


def test_a_killed_worker_costs_one_attempt_and_no_step(launch: Launch) -> None:
    """kill -9 in mid-trial: the second attempt goes on where the first was; every trial ends once."""
    sweep = launch("tracking=none", "hydra.sweeper.n_trials=3", "workers.fake.step_seconds=0.05")
    sweep.until_steps(1, lines=3)
    before = spool(sweep.trial(1))[:-1]  # the checkpoint of the last may not be written yet
    sweep.workers()[0].kill()
    sweep.end()
    trials = sweep.check_each_once(3)
    assert [trial.user_attrs["attempt"] for trial in trials] == [1, 2, 1]
    assert spool(sweep.trial(1))[: len(before)] == before, "what was measured before is kept"


def _spared(sweep: Sweep) -> bool:
    """Whether a trial under way could lose a worker twice more: the driver may hand it out meanwhile."""
    attempts = sweep.handed_out().values()
    return bool(attempts) and max(attempts) <= 1


def _kill_one(sweep: Sweep, draw: random.Random) -> int:
    """Kill a worker at a random moment, now and then its successor in its imports as well."""
    sweep.until(lambda: _spared(sweep), "trials in their first attempt")
    time.sleep(draw.uniform(0.0, 0.5))
    before, workers = sweep.handed_out(), sweep.workers()
    if not (workers and _spared(sweep)):
        return 0
    draw.choice(workers).kill()
    kills = 1
    if draw.random() < 0.3:
        found = sweep.until(lambda: set(sweep.workers()) - set(workers), "a successor started")
        found.pop().kill()
        kills = 2

    def came_up() -> bool:
        """A worker has taken a trial since: three that die before they can are the study's end."""
        now = sweep.handed_out()
        return max(now.values(), default=0) > 1 or not before.keys() & now.keys()

    sweep.until(came_up, "a worker took a trial")
    return kills


@pytest.mark.slow
def test_twenty_kills_of_workers_lose_nothing(launch: Launch) -> None:
    """At random moments, imports and first steps included: every result once, none left RUNNING."""
    draw = random.Random(1)
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=1000", "hydra.sweeper.n_jobs=2"),
        "workers.fake.step_seconds=0.06",
    )
    sweep.until(sweep.attempts, "the first trial began")
    kills = 0
    while kills < KILLS:
        kills += _kill_one(sweep, draw)
    last = max(int(path.name[-4:]) for path in sweep.attempts())
    sweep.until((sweep.trial(last) / "outcome.json").exists, "the last one that was hit ended")
    sweep.process.terminate()
    sweep.end(143)
    trials = [trial for trial in sweep.trials() if trial.state is not TrialState.WAITING]
    causes = Counter(trial.user_attrs["cause"] for trial in trials)
    assert set(causes) <= {"finished", "cancelled"}
    assert causes["cancelled"] <= 2, "those that ran when it was stopped"
    finished = [trial for trial in trials if trial.user_attrs["cause"] == "finished"]
    assert max(trial.user_attrs["attempt"] for trial in finished) >= 2, "kills met trials"
    for trial in finished:
        assert [line["step"] for line in spool(sweep.trial(trial.number))] == EVALUATED


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


def test_a_frozen_worker_does_not_outlive_its_driver(launch: Launch) -> None:
    """SIGSTOP to the worker, kill -9 to the driver: no process is left that holds a device."""
    sweep = launch("tracking=none", "hydra.sweeper.n_trials=2", "workers.fake.step_seconds=0.05")
    sweep.until_steps(0)
    (frozen,) = sweep.workers()
    frozen.suspend()
    sweep.process.kill()
    sweep.process.wait()
    assert psutil.wait_procs([frozen], timeout=30)[1] == []


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


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def no_memory() -> Iterator[Path]:
    """A group of processes that may not take one page more; Linux kills whoever does."""
    group = MEMORY / f"sweeper-fault-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("4096")
    except OSError:
        pytest.skip("taking a process's memory needs root and a memory cgroup (version 1)")
    yield group
    group.rmdir()


@pytest.mark.slow
def test_a_worker_killed_for_its_memory_is_out_of_memory(launch: Launch, no_memory: Path) -> None:
    """The kernel's own kill: cause oom, no second attempt of the same batch, the sweep goes on."""
    sweep = launch("tracking=none", "hydra.sweeper.n_trials=3", "workers.fake.step_seconds=0.1")
    sweep.until_steps(1)
    (worker,) = sweep.workers()
    (no_memory / "cgroup.procs").write_text(str(worker.pid))
    assert "out of memory" in sweep.end()
    trials = sweep.trials()
    assert [trial.user_attrs["cause"] for trial in trials] == ["finished", "oom", "finished"]
    assert [trial.user_attrs["attempt"] for trial in trials] == [1, 1, 1]
    assert [trial.user_attrs["counts"] for trial in trials] == [True] * 3
    assert trials[1].constraints == {"infeasible": 1.0}


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_ends_after_three(launch: Launch) -> None:
    """Its worker dies in the middle, every time: three attempts, then FAIL; the others finish."""
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"),
        *("++workers.fake.plan={1: crash}", "workers.fake.step_seconds=0.02"),
    )
    output = sweep.end()
    causes = {trial.number: trial.user_attrs["cause"] for trial in sweep.trials()}
    assert causes == {0: "finished", 1: "crash", 2: "finished", 3: "finished"}
    assert sweep.trials()[1].user_attrs["attempt"] == MAX_ATTEMPTS
    assert output.count("lora/0001: worker") == MAX_ATTEMPTS


@pytest.mark.slow
def test_a_hanging_trial_is_ended_with_everything_it_started(launch: Launch) -> None:
    """No step for two seconds: its worker's whole process group is gone, the slot is used again."""
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=2", "workers.stall_timeout_s=2"),
        *("++workers.fake.plan={0: hang}", "workers.fake.step_seconds=0.02"),
    )
    groups = {sweep.until(sweep.workers, "a worker started")[0].pid}
    while sweep.process.poll() is None:
        groups |= {worker.pid for worker in sweep.workers()}
        time.sleep(0.05)
    sweep.end()
    causes = [trial.user_attrs["cause"] for trial in sweep.trials()]
    assert causes == ["timeout", "finished"]
    assert len(groups) >= MAX_ATTEMPTS
    for group in groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
