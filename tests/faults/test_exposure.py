"""S5: what listens while a sweep runs."""

from __future__ import annotations

import psutil
import pytest

from tests.faults.conftest import Launch
from tests.faults.sweep import Sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _listening(sweep: Sweep) -> set[str]:
    """Addresses on which the driver and all that it started take connections."""
    driver = psutil.Process(sweep.process.pid)
    found = set()
    for process in (driver, *driver.children(recursive=True)):
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        listening = [each for each in connections if each.status == psutil.CONN_LISTEN]
        found |= {each.laddr.ip.removeprefix("::ffff:") for each in listening}  # IPv4 in IPv6
    return found


def test_a_sweep_with_local_workers_listens_nowhere(launch: Launch) -> None:
    """Driver and workers talk through pipes."""
    sweep = launch("tracking=none", "hydra.sweeper.n_trials=1", "workers.fake.step_seconds=0.1")
    sweep.until_steps(0)
    assert _listening(sweep) == set()
    sweep.end()


def test_a_ray_that_is_started_here_listens_to_this_machine_only(launch: Launch) -> None:
    """Head, raylet and workers: 127.0.0.1 and nothing else."""
    pytest.importorskip("ray", reason="Ray is optional")
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=1", "workers.engine=ray"),
        "workers.fake.step_seconds=0.5",
    )
    sweep.until_steps(0)
    assert _listening(sweep) == {"127.0.0.1"}
    sweep.end()
