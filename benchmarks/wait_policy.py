"""What spinning OpenMP threads cost a trial, alone and beside one other busy process.

Trains eight steps of the default trial under OMP_WAIT_POLICY active and passive, each in a process of
its own, alternating, first on an idle machine and then beside a matrix product that keeps all cores
busy.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import record

ROUNDS = 2
STEPS = 8
TRIAL = ["tracking=none", f"training.max_steps={STEPS}", f"training.eval_steps={STEPS}"]
NEIGHBOUR = "import torch\na = torch.randn(700, 700)\nwhile True: a @ a"


def train_seconds(policy: str) -> float:
    """Training seconds per step, from the trial's own log."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "sweeper", *TRIAL],
            cwd=folder,
            env={**os.environ, "OMP_WAIT_POLICY": policy},
            capture_output=True,
            text=True,
            check=True,
        )
    line = next(line for line in result.stdout.splitlines() if "cost/train_seconds" in line)
    return float(line.split()[-1]) / STEPS


def medians() -> dict[str, float]:
    """Alternating rounds of both policies."""
    policies = ("active", "passive")
    seconds = [{policy: train_seconds(policy) for policy in policies} for _ in range(ROUNDS)]
    return {policy: statistics.median(row[policy] for row in seconds) for policy in policies}


def compare() -> dict[str, float]:
    """Seconds per step under both policies and their ratio."""
    found = medians()
    ratio = found["active"] / found["passive"]
    return {name: round(value, 3) for name, value in {**found, "active / passive": ratio}.items()}


if __name__ == "__main__":
    alone = compare()
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR], cwd=Path(__file__).parent) as busy:
        try:
            beside = compare()
        finally:
            busy.kill()
    record("wait_policy", {"seconds per step": {"idle machine": alone, "busy neighbour": beside}})
