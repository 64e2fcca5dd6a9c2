"""One run of the program: everything put together, and taken apart again whatever happens.

The only place that knows workers, search, tracking and reporting at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from rich.console import Console

from sweeper.errors import StudyError, StudyLocked, WorkerError
from sweeper.folders import StudyFolder, TrialFolder, read_json, write_atomic, write_json
from sweeper.outcome import Facts, Outcome
from sweeper.reporting.results import (
    ArmResult,
    Results,
    TrialResult,
    from_document,
    rank,
    to_document,
)
from sweeper.reporting.tables import (
    comparison,
    describe_data,
    leaderboard,
    markdown_report,
    verdict,
)
from sweeper.reporting.view import make_console, make_view
from sweeper.search.board import Board, View
from sweeper.search.driver import POLL_SECONDS, ArmDriver
from sweeper.search.plan import ArmPlan, StudyPlan
from sweeper.search.states import STATES
from sweeper.search.study import counted, first_points, open_storage, open_study
from sweeper.settings import LoraAdapter, Settings, Tracking, TrialSettings, flatten
from sweeper.tracking.mlflow_tracker import MlflowTracker, local_uri
from sweeper.tracking.provenance import provenance
from sweeper.tracking.tracker import NullTracker, RunStatus, StudyRecord, Tracker, TrialRecord
from sweeper.workers.engines import open_engine
from sweeper.workers.protocol import (
    Ended,
    Engine,
    Evaluated,
    Lost,
    Probe,
    Probed,
    Progress,
    Slots,
    Submit,
)

LEADERBOARD_ROWS = 10


def run_study(plan: StudyPlan) -> Results:
    """Run a study to its end, or resume it; the answer is printed, written and recorded.

    Raises:
        SweeperError: it cannot be run; the message says what to do.
        KeyboardInterrupt: the user stopped it; the same command resumes it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    console = make_console()
    folder = StudyFolder(Path(plan.settings.output_dir) / plan.study.study_name)
    with _one_driver(folder), _termination_as_interrupt():
        session = StudySession(plan, folder, console)
        return session.run()


class StudySession:
    """A study while it runs."""

    def __init__(self, plan: StudyPlan, folder: StudyFolder, console: Console) -> None:
        self._plan = plan
        self._folder = folder
        self._console = console
        self._storage = open_storage(plan.study.storage, folder)
        self._provenance = provenance(plan.command)
        self._tracker = make_tracker(plan.settings.tracking)
        self._board = Board()
        self._slots: dict[int, int] = {}
        self._arms: list[ArmResult] = []

    def run(self) -> Results:
        """See run_study."""
        workers = self._plan.settings.workers
        status: RunStatus = "FAILED"
        self._tracker.open_study(self._record())
        engine = open_engine(workers, self._plan.study.n_jobs, self._folder.worker_log)
        try:
            with make_view(self._console) as view:
                view.event(
                    f"study {self._plan.study.study_name}: loading the base model and the data"
                )
                for arm in self._plan.arms:
                    self._run_arm(arm, engine, view)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            engine.close()
            results = self._conclude(status)
        return results

    def _run_arm(self, arm: ArmPlan, engine: Engine, view: View) -> None:
        facts = self._probe(arm, engine)
        study = open_study(self._plan, arm, facts, self._storage)
        done = counted(study)
        self._announce(arm, facts, done, view)
        self._board.open_arm(arm.name, arm.n_trials, facts.base_loss)
        driver = ArmDriver(
            arm=arm,
            study=study,
            facts=facts,
            folder=self._folder,
            pruner=self._plan.study.pruner,
            engine=engine,
            tracker=self._tracker,
            view=view,
            board=self._board,
            provenance=self._provenance,
            slots=self._slots,
        )
        try:
            driver.run()
        finally:
            self._arms.append(arm_result(arm, facts, study))

    def _probe(self, arm: ArmPlan, engine: Engine) -> Facts:
        """Ask the first free worker what this arm starts from."""
        while not any(self._slots.values()):
            self._wait_for_slots(engine)
        worker = next(worker for worker, free in self._slots.items() if free)
        self._slots[worker] -= 1
        engine.probe(worker, Probe(arm=arm.name, settings=arm.settings.trial))
        while True:
            event = engine.next_event(POLL_SECONDS)
            if isinstance(event, Slots):
                self._slots[event.worker] = event.free
            elif isinstance(event, Lost):
                raise WorkerError(
                    f"the worker died while it loaded the base model:\n{event.message}"
                )
            elif isinstance(event, Probed) and event.facts is None:
                raise StudyError(f"arm {arm.name}: {event.message}")
            elif isinstance(event, Probed) and event.facts is not None:
                return event.facts

    def _wait_for_slots(self, engine: Engine) -> None:
        event = engine.next_event(POLL_SECONDS)
        if isinstance(event, Slots):
            self._slots[event.worker] = event.free

    def _announce(self, arm: ArmPlan, facts: Facts, done: int, view: View) -> None:
        result = ArmResult(arm.name, arm.n_trials, method(arm), base_name(arm, facts), facts, ())
        if arm is self._plan.arms[0]:
            view.event(f"data: {describe_data(result)}")
            view.event(f"device: {facts.device}, base held as {facts.dtype}")
        text = f"arm {arm.name}: {arm.n_trials} trials"
        if done >= arm.n_trials:
            text += ", all of them done before: nothing to train"
        elif done:
            text += f", {done} of them done before"
        points = len(first_points(arm))
        if points and arm.sampler.name != "grid":
            text += f", {points} known-good points first"
        view.event(f"{text}; untuned base {facts.base_loss:.4f}")

    def _conclude(self, status: RunStatus) -> Results:
        """Write, record and print what there is, whether or not the study came to its end."""
        results = Results(
            study_name=self._plan.study.study_name,
            command=self._plan.command,
            provenance=self._provenance,
            arms=tuple(self._arms),
        )
        if self._arms:
            write_json(self._folder.results, to_document(results))
            write_atomic(self._folder.report, markdown_report(results))
            best = self._arms[0].best
            self._tracker.close_study(
                status,
                {} if best is None else best.outcome.metrics,
                {} if best is None else best.point,
                markdown_report(results),
                [self._folder.results, self._folder.report],
            )
        problems = self._tracker.close()
        if self._arms:
            print_results(results, self._console)
            self._console.print(self._next_commands(status), highlight=False, soft_wrap=True)
        for problem in problems:
            self._console.print(f"not recorded in MLflow: {problem}", style="yellow")
        return results

    def _next_commands(self, status: RunStatus) -> str:
        name = self._plan.study.study_name
        total = self._plan.study.n_trials
        lines = ["", f"Results    {self._folder.report}"]
        best = self._arms[0].best
        if best is not None:
            artifact = self._folder.trial(best.arm, best.number).artifact
            lines.append(f"Best       {artifact or self._folder.trial(best.arm, best.number).path}")
        if status != "FINISHED":
            return "\n".join([*lines, f"Resume     python -m sweeper {self._plan.command}"])
        extended = _with(self._plan.command, "hydra.sweeper.n_trials", str(2 * total))
        anew = _with(self._plan.command, "hydra.sweeper.study_name", f"{name}_2")
        return "\n".join(
            [
                *lines,
                f"Read       python -m sweeper report {name}",
                f"Browse     {browse_command(self._plan.settings.tracking)}",
                f"Extend     python -m sweeper {extended}",
                f"Anew       python -m sweeper {anew}",
            ]
        )

    def _record(self) -> StudyRecord:
        arms = {f"{arm.name}.n_trials": arm.n_trials for arm in self._plan.arms}
        spaces = {
            f"{arm.name}.space.{key}": str(domain)
            for arm in self._plan.arms
            for key, domain in arm.space.items()
        }
        name = self._plan.study.study_name
        return StudyRecord(self._plan.experiment, name, {**arms, **spaces}, self._provenance)


def run_single(settings: Settings, folder: TrialFolder) -> Outcome:
    """Train one trial through the same worker and protocol as a study's.

    Raises:
        SweeperError: the worker cannot train it.
    """
    console = make_console()
    facts = provenance("")
    params = flatten(settings.trial.model_dump(mode="json", exclude_none=True))
    record = TrialRecord(f"single/{folder.path.name}", folder, params, facts)
    tracker = make_tracker(settings.tracking)
    engine = open_engine(settings.workers, 1, lambda worker: folder.path / f"worker_{worker}.log")
    try:
        with _termination_as_interrupt():
            outcome = _train_one(settings.trial, record, facts, engine, tracker, console)
    finally:
        engine.close()
    status = STATES[outcome.cause].status or "FAILED"
    tracker.end(record, status, outcome.metrics, {"cause": outcome.cause})
    problems = tracker.close()
    if folder.log_text.exists():
        console.print(folder.log_text.read_text(encoding="utf-8"), highlight=False)
    elif outcome.message:
        console.print(outcome.message, highlight=False)
    console.print(f"Folder     {folder.path}", highlight=False)
    console.print(f"Browse     {browse_command(settings.tracking)}", highlight=False)
    for problem in problems:
        console.print(f"not recorded in MLflow: {problem}", style="yellow")
    return outcome


def _train_one(
    settings: TrialSettings,
    record: TrialRecord,
    facts: Mapping[str, str],
    engine: Engine,
    tracker: Tracker,
    console: Console,
) -> Outcome:
    view = make_view(console)
    submitted = False
    while True:
        event = engine.next_event(POLL_SECONDS)
        match event:
            case Slots() if not submitted:
                submitted = True
                tracker.start(record)
                engine.submit(
                    event.worker,
                    Submit(
                        trial=record.key,
                        attempt=1,
                        folder=record.folder.path.resolve(),
                        settings=settings,
                        provenance=dict(facts),
                    ),
                )
            case Evaluated():
                tracker.ship(record)
                console.print(
                    f"step {event.step} of {event.total_steps}: eval loss {event.loss:.4f}"
                )
            case Ended():
                return event.outcome
            case Lost() if submitted:
                return Outcome(cause="crash", message=event.message)
            case Progress() | Probed() | Slots() | Lost() | None:
                view.update(Board())


def arm_result(arm: ArmPlan, facts: Facts, study: optuna.Study) -> ArmResult:
    """What an arm has so far, from its storage."""
    trials = [
        TrialResult(
            arm.name,
            frozen.number,
            frozen.params,
            Outcome.model_validate(frozen.user_attrs["outcome"]),
        )
        for frozen in study.get_trials(deepcopy=False)
        if frozen.state.is_finished() and "outcome" in frozen.user_attrs
    ]
    return ArmResult(
        arm.name, arm.n_trials, method(arm), base_name(arm, facts), facts, rank(trials)
    )


def method(arm: ArmPlan) -> str:
    """What an arm does, in the field's words."""
    settings = arm.settings
    if not isinstance(settings.adapter, LoraAdapter):
        return "full fine-tuning"
    return "QLoRA" if settings.quantization.load_in_4bit else "LoRA"


def base_name(arm: ArmPlan, facts: Facts) -> str:
    """How an arm holds its base: the 4-bit type, or the dtype."""
    quantization = arm.settings.quantization
    return quantization.bnb_4bit_quant_type if quantization.load_in_4bit else facts.dtype


def load_results(study_name: str, output_dir: Path) -> Results:
    """Read a study's results.

    Raises:
        StudyError: there is no such study; lists those that exist.
    """
    path = StudyFolder(output_dir / study_name).results
    if not path.exists():
        names = sorted(found.parent.name for found in output_dir.glob("*/results.json"))
        known = f"studies there: {', '.join(names)}" if names else "there are no studies yet"
        raise StudyError(f"no results of a study {study_name!r} under {output_dir}/; {known}")
    return from_document(read_json(path))


def print_results(results: Results, console: Console) -> None:
    """Leaderboards, then the comparison, then the verdict in words."""
    for arm in results.arms:
        console.print(leaderboard(arm, LEADERBOARD_ROWS).draw())
    console.print(comparison(results).draw())
    console.print(verdict(results), highlight=False, soft_wrap=True)


def make_tracker(settings: Tracking) -> Tracker:
    """The tracker that `tracking` names."""
    if settings.kind == "none":
        return NullTracker()
    return MlflowTracker(settings.uri, Path("mlruns"))


def browse_command(settings: Tracking) -> str:
    """How to look at the runs."""
    if settings.kind == "none":
        return "(tracking=none: nothing recorded)"
    uri = settings.uri or local_uri(Path("mlruns"))
    if uri.startswith("http"):
        return uri
    return f"mlflow ui --backend-store-uri {uri}   (in a checkout: make ui)"


def _with(command: str, key: str, value: str) -> str:
    """A command with one override set, before its -m."""
    words = [word for word in shlex.split(command) if not word.startswith(f"{key}=")]
    return shlex.join([*words[:-1], f"{key}={value}", words[-1]])


@contextmanager
def _one_driver(folder: StudyFolder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    owner = folder.lock.with_suffix(".pid")
    try:
        with FileLock(folder.lock, timeout=0):
            write_atomic(owner, f"{os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            yield
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "unknown"
        raise StudyLocked(
            f"study {folder.path.name!r} is already run by another driver (process {who}); wait for "
            "it, or start another study with hydra.sweeper.study_name=NAME"
        ) from None


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run the way Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
