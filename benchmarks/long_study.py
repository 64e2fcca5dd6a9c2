"""Measure the driver of a study of 2,000 fake trials from outside: CPU time, memory and resume.

    python benchmarks/long_study.py [--trials 2000] [--before CHECKOUT]

The command is the one that users give, as a process of its own, with the fake trainer, SQLite and
MLflow's local store. Only the driver's process is counted, not its worker. At half of the trials the
driver is killed (SIGKILL) and started again. With `--before`, an earlier checkout does the same after
it, each in an empty folder. Both need the environment that this script runs in.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from record import record

ROOT = Path(__file__).resolve().parents[1]
NAME = "long"
WINDOW = 100
"""Trials over which CPU time a trial is measured."""
COMMAND = (
    *(sys.executable, "-m", "sweeper", "-m", "+experiment=lr_rank_sweep", "workers=fake"),
    *("finalists=none", "~hydra.sweeper.arms.full", "sampler=tpe"),
    f"hydra.sweeper.study_name={NAME}",
)
FINISHED = "SELECT COUNT(*) FROM trials WHERE state NOT IN ('RUNNING', 'WAITING')"
LIMIT_S = 3600


@dataclass
class Watch:
    """What was seen of a driver: (finished trials, CPU seconds, MiB) once a second."""

    seen: list[tuple[int, float, float]] = field(default_factory=list)
    start_s: float | None = None
    """Seconds from the start until a further trial was finished."""

    def cpu_per_trial(self, trials: int) -> float:
        """Return the CPU seconds of one trial, over the window around this number of trials."""
        first = next(row for row in self.seen if row[0] >= trials - WINDOW / 2)
        last = next((row for row in self.seen if row[0] >= trials + WINDOW / 2), self.seen[-1])
        return round((last[1] - first[1]) / (last[0] - first[0]), 3)

    @property
    def largest_mib(self) -> int:
        """The largest memory of the driver."""
        return round(max(mib for _, _, mib in self.seen))


def watch(folder: Path, checkout: Path, total: int, until: int) -> Watch:
    """Start the command, watch its driver, and kill it once so many trials are finished.

    Raises:
        RuntimeError: the command failed, or the study did not grow within the limit.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "MLFLOW_DISABLE_TELEMETRY": "true"}
    before, found = finished(folder), Watch()
    began = time.monotonic()
    with (folder / "log.txt").open("ab") as log:
        driver = subprocess.Popen(
            [*COMMAND, f"hydra.sweeper.n_trials={total}"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        count = finished(folder)
        if found.start_s is None and count > before:
            found.start_s = round(time.monotonic() - began, 2)
        with process.oneshot():
            times, size = process.cpu_times(), process.memory_info().rss / 2**20
        if size > 0:  # else it has ended since
            found.seen.append((count, times.user + times.system, size))
        if count >= until and until < total:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            return found
        if time.monotonic() - began > LIMIT_S:
            driver.kill()
            raise RuntimeError(f"{count} trials after {LIMIT_S} s: {folder / 'log.txt'}")
        time.sleep(0.2)
    if driver.returncode:
        raise RuntimeError(f"exit code {driver.returncode}: {(folder / 'log.txt').read_text()}")
    return found


def finished(folder: Path) -> int:
    """Return the number of trials that the study in a folder has finished."""
    database = next(folder.glob("outputs/*/study.db"), None)
    if database is None:
        return 0
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            (count,) = connection.execute(FINISHED).fetchone()
    except sqlite3.OperationalError:  # it is being created, or written to
        return 0
    return int(count)


def measure(checkout: Path, total: int) -> dict[str, Any]:
    """Return the figures of one checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = watch(folder, checkout, total, total // 2)
        second = watch(folder, checkout, total, total)
        ended = finished(folder)
    assert ended == total, f"{ended} trials, not {total}"
    return {
        f"CPU s a trial at {WINDOW}": first.cpu_per_trial(WINDOW),
        f"CPU s a trial at {total // 2}": first.cpu_per_trial(total // 2),
        f"CPU s a trial at {total}": second.cpu_per_trial(total),
        "MiB of the driver, most": max(first.largest_mib, second.largest_mib),
        f"seconds to the next trial after kill -9 at {total // 2}": second.start_s,
        "trials": ended,
    }


def main() -> None:
    """Measure this checkout, and an earlier one if it is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--before", type=Path)
    asked = parser.parse_args()
    figures = {"now": measure(ROOT, asked.trials)}
    if asked.before is not None:
        figures["before"] = measure(asked.before.resolve(), asked.trials)
    record("long_study", figures)


if __name__ == "__main__":
    main()
