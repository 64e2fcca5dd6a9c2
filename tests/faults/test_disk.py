"""R11: a disk that fills up in the middle of a sweep, and has room again later."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIZE_MIB = 6
"""Room for a small study and its report."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """outputs/ as a file system of its own."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("a disk that can be filled needs the right to mount a tmpfs (run as root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """Not one byte is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def test_a_full_disk_pauses_the_sweep_and_loses_nothing(launch: Launch, disk: Path) -> None:
    """Full for database, results, spools and checkpoints: it waits, says so, and goes on with space.

    What was written before stays whole and readable meanwhile.
    """
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2"),
        "workers.fake.step_seconds=0.2",
    )
    sweep.until_steps(2)
    ballast = _fill(disk)
    words = ("waiting for the study's database", "is full. Waiting for space")
    sweep.until(lambda: any(word in sweep.output for word in words), "driver or worker noticed")
    for path in sweep.study.glob("lora/trial_*/checkpoints/*.json"):
        json.loads(path.read_text())
    with sqlite3.connect(f"file:{sweep.study / 'study.db'}?mode=ro", uri=True) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert sweep.process.poll() is None
    ballast.unlink()
    sweep.end()
    assert {trial.user_attrs["attempt"] for trial in sweep.check_each_once(6)} == {1}
