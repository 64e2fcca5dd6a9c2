"""How soon the command line answers: median wall seconds of five runs each, in a new process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from record import record

QUESTIONS = {
    "help": ["--help"],
    "composed config": ["--cfg", "job"],
    "four errors, single": [
        "training.learning_rte=1",
        "quantization=nf5",
        "seed=abc",
        "adapter.r=0",
    ],
    "four errors, study": [
        *("+experiment=lr_rank_sweep", "-m", "training.learning_rte=1", "quantization=nf5"),
        *("seed=abc", "adapter.r=0"),
    ],
    "unknown experiment": ["+experiment=nope", "-m"],
}
RUNS = 5


def seconds(arguments: list[str]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sweeper", *arguments]
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    medians = {
        name: round(statistics.median(seconds(arguments) for _ in range(RUNS)), 2)
        for name, arguments in QUESTIONS.items()
    }
    record("command_line", {"median seconds": medians, "runs": RUNS})
