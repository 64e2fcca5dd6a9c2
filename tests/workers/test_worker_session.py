"""A worker leads a session of its own, and a niced command stays nice."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sweeper.workers.worker_session import AUTOGROUP

SHOW = """
import os
from sweeper.workers.worker_session import group_nice, lead_session
lead_session()
print(os.getsid(0) == os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), group_nice())
"""


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this system does not schedule by session")
@pytest.mark.parametrize(
    "nice", [7, *(pytest.param(each, marks=pytest.mark.slow) for each in (0, 19))]
)
def test_a_niced_command_has_niced_workers(nice: int) -> None:
    """The session that Linux gives the CPU to has the nice value of the command."""
    command = ["nice", "-n", str(nice), sys.executable, "-S", "-c", SHOW]
    # in a group that is not niced, and without the niceness of the test run itself
    started = f"import os, subprocess; os.setsid(); subprocess.run({command}, check=True)"
    run = subprocess.run(
        [sys.executable, "-S", "-c", started],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    alone, process, group = run.stdout.split()
    assert alone == "True"
    assert int(group) == int(process) >= nice


@pytest.mark.slow
def test_without_autogroups_a_worker_only_leads_a_session() -> None:
    """Nothing is written, and nothing fails, where Linux has no autogroups."""
    elsewhere = SHOW.replace("lead_session()\n", "", 1).replace(
        "import group_nice, lead_session",
        "import group_nice, lead_session\nimport pathlib, sweeper.workers.worker_session as s\n"
        "s.AUTOGROUP = pathlib.Path('/nowhere')\nlead_session()",
    )
    command = ["nice", "-n", "5", sys.executable, "-S", "-c", elsewhere]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split()[::2] == ["True", "None"]
