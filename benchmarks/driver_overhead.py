"""What the driver costs a trial, by phase: CPU and wall milliseconds after 100 and 1,000 finished ones.

    python benchmarks/driver_overhead.py [--sizes 100 1000] [--samplers tpe lora gp random]

The real driver, the real study on SQLite and MLflow's real local store; only the trainer is a fake, in
a worker process of its own, so that none of its time is counted. A study of a few trials is filled up
with copies of them (in Optuna's storage, in MLflow, and as trial folders), and resumed by the same
command for 20 trials more, which are measured. Counted is all that the driver's process does between
two trials; of the wall time, only that of the driver's thread, because recording runs beside it.
Results are written after every trial here, as they are where a trial takes longer than a fake one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from record import record

from sweeper.commands import run_study
from sweeper.core.paths import StudyFolder
from sweeper.driver.arm_search import ArmSearch
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.jobs import JobPhase
from sweeper.driver.results_writer import ResultsWriter
from sweeper.driver.running_trial import RunningTrial
from sweeper.driver.study_supervisor import StudySupervisor
from sweeper.search.states import STATES
from sweeper.search.study import open_storage, optuna_name
from sweeper.search.study_plan import ArmPlan, StudyPlan, studies
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.shipment import RunShipper
from sweeper.tracking.tracker import StudyRecord, TrialRecord
from sweeper.tracking.tracker_factory import make_tracker

SEEDED = 12
MEASURED = 20
NAME = "overhead"
PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "ask": ((ArmSearch, "next_job"),),
    "compose and validate": ((ArmPlan, "settings_at"),),
    "hand out": ((RunningTrial, "send"),),
    "report and prune": ((RunningTrial, "_evaluated"),),
    "listen and tell": ((Dispatcher, "_route"),),
    "steer": ((StudySupervisor, "on_turn"),),
    "write results": ((ResultsWriter, "on_trial_finished"),),
    "loop": ((ArmSearch, "_may_ask"),),
    "record": ((MlflowTracker, "start"), (MlflowTracker, "end")),
    "ship": ((RunShipper, "ship"),),
}
"""The functions of each phase; what a function of another phase does inside is that phase's."""


@dataclass
class Stopwatch:
    """Seconds by phase: of a phase's own code, not of the phases inside it."""

    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    first_submit: tuple[float, float] | None = None
    """Wall and CPU clock of the process."""
    _open: threading.local = field(default_factory=threading.local)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge a block to a phase."""
        stack: list[list[float]] = self._open.__dict__.setdefault("stack", [])
        began = time.perf_counter(), time.thread_time()
        stack.append([0.0, 0.0])
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - began[0], time.thread_time() - began[1]
            inside = stack.pop()
            self.wall[name] += wall - inside[0]
            self.cpu[name] += cpu - inside[1]
            if stack:
                stack[-1][0] += wall
                stack[-1][1] += cpu

    def clear(self) -> None:
        """Forget what came before the trials that are measured."""
        self.wall.clear()
        self.cpu.clear()


def timed(watch: Stopwatch, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose calls are charged to a phase."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with watch.phase(name):
            return function(*arguments, **options)

    return call


@contextlib.contextmanager
def instrumented(watch: Stopwatch) -> Iterator[None]:
    """Every function of PHASES timed, and the moment of the first trial noted."""
    before = {
        (owner, attribute): getattr(owner, attribute)
        for functions in PHASES.values()
        for owner, attribute in functions
    }
    send = RunningTrial.send

    def noted(self: RunningTrial, *arguments: Any) -> JobPhase:
        phase = send(self, *arguments)
        if watch.first_submit is None and phase is JobPhase.RUNNING:
            watch.first_submit = time.perf_counter(), time.process_time()
            watch.clear()
        return phase

    RunningTrial.send = noted  # type: ignore[method-assign]
    for name, functions in PHASES.items():
        for owner, attribute in functions:
            setattr(owner, attribute, timed(watch, name, getattr(owner, attribute)))
    try:
        yield
    finally:
        for (owner, attribute), function in before.items():
            setattr(owner, attribute, function)


def make_plan(sampler: str, n_trials: int) -> StudyPlan:
    """The main job's search, as anybody would run it, with the fake trainer."""
    (plan,) = studies(
        [
            *("+experiment=lr_rank_sweep", "workers=fake", "finalists=none"),
            *("~hydra.sweeper.arms.full", f"sampler={sampler}"),
            *(f"hydra.sweeper.study_name={NAME}", f"hydra.sweeper.n_trials={n_trials}"),
        ]
    )
    return plan


def run(plan: StudyPlan) -> None:
    """The study to its end, in silence."""
    with contextlib.redirect_stdout(io.StringIO()):
        run_study.run_study(plan)


def fill(size: int) -> None:
    """Copies of the study's trials up to `size`, wherever a finished trial leaves something."""
    plan = make_plan("random", size)
    folder = StudyFolder(Path(plan.settings.output_dir) / NAME)
    storage = open_storage(None, folder)
    study = optuna.load_study(study_name=optuna_name(NAME, "lora"), storage=storage)
    originals = study.get_trials(deepcopy=False)
    rates = optuna.samplers.RandomSampler(seed=0)
    copies = [_copy(study, rates, originals, number) for number in range(len(originals), size)]
    study.add_trials(copies)
    tracker = make_tracker(plan.settings.tracking, folder.tracking)
    tracker.open_study(StudyRecord(plan.experiment, NAME, {}, {}, plan.objective))
    for number, frozen in enumerate(copies, start=len(originals)):
        original = folder.trial("lora", number % len(originals))
        shutil.copytree(original.path, folder.trial("lora", number).path)
        key = f"lora/{number:04d}"
        trial = TrialRecord(key, folder.trial("lora", number), {"seed": 0}, {"arm": "lora"})
        tracker.start(trial)
        outcome = frozen.user_attrs["outcome"]
        status = STATES[outcome["cause"]].status
        assert status is not None, outcome
        tracker.end(trial, status, outcome["metrics"], {"cause": outcome["cause"]})
    assert tracker.close() == []


def _copy(
    study: optuna.Study, rates: optuna.samplers.BaseSampler, trials: list[FrozenTrial], number: int
) -> FrozenTrial:
    """A finished trial at another point: another learning rate, and the value that belongs to it."""
    original = trials[number % len(trials)]
    rate = rates.sample_independent(
        study, original, "training.learning_rate", original.distributions["training.learning_rate"]
    )
    params = {**original.params, "training.learning_rate": rate}
    return optuna.trial.create_trial(
        state=original.state,
        value=original.value,
        params=params,
        distributions=original.distributions,
        user_attrs={**original.user_attrs, "point": params},
        constraints=original.constraints,
        intermediate_values=original.intermediate_values,
    )


def measure(sampler: str, size: int) -> dict[str, Any]:
    """Milliseconds a trial, after `size` finished ones, and the seconds until the first."""
    watch, plan = Stopwatch(), make_plan(sampler, size + MEASURED)
    run_study.WRITING_SHARE = float("inf")
    with instrumented(watch):
        began = time.perf_counter()
        cpu = time.process_time()
        run(plan)
        whole_cpu = time.process_time() - cpu
    assert watch.first_submit is not None
    per = 1000 / (MEASURED - 1)  # the first trial's hand-out started the clock
    phases = {
        name: {
            "CPU ms": round(per * watch.cpu[name], 1),
            "wall ms": round(per * watch.wall[name], 1),
        }
        for name in PHASES
    }
    driver_wall = sum(watch.wall[name] for name in PHASES if name != "ship")
    return {
        "CPU ms": round(per * sum(watch.cpu.values()), 1),
        "wall ms of the driver's thread": round(per * driver_wall, 1),
        "phases": phases,
        "seconds to the first new trial": round(watch.first_submit[0] - began, 2),
        "CPU seconds to the first new trial": round(watch.first_submit[1] - cpu, 2),
        "CPU seconds of the whole command": round(whole_cpu, 2),
    }


def in_folder(folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step in a process of its own, as a command is: MLflow keeps its connections open."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(os.chdir, folder).result()
        return process.submit(work, *arguments).result()


def start() -> None:
    """The few real trials that all others are copies of."""
    run(make_plan("random", SEEDED))


def main() -> None:
    """Fill once for each size, measure each sampler on a copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "lora", "gp", "random"])
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    for size in asked.sizes:
        with tempfile.TemporaryDirectory() as root:
            place, filled = Path(root) / "study", Path(root) / "filled"
            place.mkdir()
            in_folder(place, start)
            in_folder(place, fill, size)
            place.rename(filled)
            for sampler in asked.samplers:
                shutil.copytree(filled, place)  # where it was: a store that moved is asked anew
                measured = in_folder(place, measure, sampler, size)
                figures.setdefault(sampler, {})[f"{size:,} finished"] = measured
                shutil.rmtree(place)
    record("driver_overhead", {"trials measured": MEASURED, **figures})


if __name__ == "__main__":
    main()
