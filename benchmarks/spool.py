"""What one observation costs a training loop: a line of metrics.jsonl, while MLflow is away.

Ten thousand writes of ten metrics each, as a trial of ten thousand steps makes them; beside them, in the
same process, a tracker that tries all the while to ship to a port where nobody listens. Then what the
driver waits for in each call of the tracker: one small file, synced.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from record import record

from sweeper.config.settings import Objective
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import MetricsSpool
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.tracker import StudyRecord, TrialRecord
from sweeper.tracking.tracking_server import TrackingServer

WRITES, CALLS = 10_000, 200
NOWHERE = "http://127.0.0.1:9"
LOSS = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)


def percentiles(call: Callable[[int], None], times: int) -> dict[str, float]:
    """Milliseconds of a call: median, the 99th of a hundred, and the worst."""
    milliseconds = []
    for number in range(times):
        started = time.perf_counter()
        call(number)
        milliseconds.append(1000 * (time.perf_counter() - started))
    p99 = statistics.quantiles(milliseconds, n=100)[98]
    found = {"p50": statistics.median(milliseconds), "p99": p99, "max": max(milliseconds)}
    return {name: round(value, 4) for name, value in found.items()}


def measure(root: Path) -> dict[str, dict[str, float]]:
    """The worker's writes and the driver's calls, MLflow being away."""
    folder = TrialFolder(root / "study" / "lora" / "trial_0000")
    trial = TrialRecord("lora/0000", folder, {"training.learning_rate": 0.001})
    tracker = MlflowTracker(TrackingServer(NOWHERE, root), root / "study" / ".tracking")
    tracker.open_study(StudyRecord("bench", "study", {}, {}, LOSS))
    tracker.start(trial)
    tracker.ship(trial)
    spool = MetricsSpool(folder.metrics, 0)
    metrics = {f"train/metric_{number}": 1.0 / (number + 3) for number in range(10)}
    figures = {"spool.write, ms": percentiles(lambda n: spool.write(n, metrics), WRITES)}
    figures["tracker.ship, ms"] = percentiles(lambda _: tracker.ship(trial), WRITES)
    figures["tracker.end, ms"] = percentiles(
        lambda n: tracker.end(trial, "FINISHED", {"best/eval_loss": float(n)}, {}), CALLS
    )
    tracker.close(hurry=True)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        record("spool", {"machine": "loaded by other work", **measure(Path(place))})
