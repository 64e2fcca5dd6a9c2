"""One trial by hand (`python -m sweeper`, `sweeper trial`), through a study's worker and protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from sweeper.config.settings import RunSettings, TrialSettings, metric_words
from sweeper.core.errors import StudyError, TrialFailed
from sweeper.core.outcome import ArmBaseline, Outcome, TrialSize
from sweeper.core.paths import TrialFolder
from sweeper.core.quiet import silence_libraries
from sweeper.core.signals import StopSignal, deferred_interrupt
from sweeper.driver.arm_search import POLL_SECONDS
from sweeper.driver.trial_sizes import recorded
from sweeper.reporting.console import make_console
from sweeper.reporting.result_tables import describe_data
from sweeper.search.states import STATES
from sweeper.tracking.provenance import origin, provenance
from sweeper.tracking.tracker import Tracker, TrialRecord, dataset_record
from sweeper.tracking.tracker_factory import browse_command, make_tracker
from sweeper.workers.engines import open_engine
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    Engine,
    EvaluatedEvent,
    LostEvent,
    ProbeCommand,
    ProbedEvent,
    SlotsEvent,
    SubmitCommand,
)


def run_single(settings: RunSettings, folder: TrialFolder, command: str) -> Outcome:
    """Train one trial and show its log; see `train_single`.

    Raises:
        StudyError: the folder is used.
        TrialFailed: it ended without a result: refused, out of memory, diverged, a crash, an error.
        KeyboardInterrupt: the user stopped it.
    """
    if settings.verbosity != "verbose":
        silence_libraries()
    console = make_console()
    quiet = settings.verbosity == "quiet"
    outcome = train_single(settings, folder, command, Console(quiet=True) if quiet else console)
    if folder.log_text.exists() and not quiet:  # a fake trial writes none
        console.print(folder.log_text.read_text(encoding="utf-8"), highlight=False)
    console.print(f"Folder     {folder.path}", highlight=False)
    console.print(f"Browse     {browse_command(settings.tracking)}", highlight=False)
    return outcome


def train_single(
    settings: RunSettings,
    folder: TrialFolder,
    command: str,
    console: Console,
    accept: Callable[[ArmBaseline], None] = lambda facts: None,
) -> Outcome:
    """Train one trial through the same worker and protocol as a study's.

    Args:
        settings: the trial, and the machinery around it.
        folder: where it is written; must not hold a trial already.
        command: what the user typed, for the record.
        console: told of every evaluation.
        accept: shown what the trial starts from before it is trained; raises to leave it at that.

    Raises:
        StudyError: the folder is used.
        TrialFailed: it ended without a result: refused, out of memory, diverged, a crash, an error.
        KeyboardInterrupt: the user stopped it.
    """
    if folder.outcome.exists():
        raise StudyError(f"{folder.path} holds a trial already; give another folder")
    tracker = make_tracker(settings.tracking, folder.tracking)
    devices = settings.training.devices_per_trial
    engine = open_engine(
        settings.workers, 1, lambda worker: folder.path / f"worker_{worker}.log", devices
    )
    stopped: KeyboardInterrupt | None = None
    single = SingleTrial(settings.trial, folder, command, engine, tracker, console, accept)
    try:
        with deferred_interrupt() as interrupt:
            outcome = single.train(interrupt)
    except KeyboardInterrupt as stop:
        outcome, stopped = Outcome(cause="cancelled"), stop
    finally:
        engine.close()
    status = STATES[outcome.cause].status or "FAILED"
    tracker.end(single.record, status, outcome.metrics, {"cause": outcome.cause})
    if status == "FINISHED":
        tracker.keep([folder])
    for problem in tracker.close(hurry=stopped is not None):
        console.print(f"not recorded in MLflow: {problem}", style="yellow")
    if stopped is not None:
        raise stopped
    if status != "FINISHED":
        raise TrialFailed(f"the trial ended as {outcome.cause}: {outcome.message}")
    return outcome


class SingleTrial:
    """A trial without a study: probe, check, submit, listen."""

    def __init__(
        self,
        settings: TrialSettings,
        folder: TrialFolder,
        command: str,
        engine: Engine,
        tracker: Tracker,
        console: Console,
        accept: Callable[[ArmBaseline], None],
    ) -> None:
        self._settings = settings
        self._accept = accept
        self._engine = engine
        self._tracker = tracker
        self._console = console
        self._facts: ArmBaseline | None = None
        self._size: TrialSize | None = None
        name = f"single/{folder.path.name}"
        self.record = TrialRecord(name, folder, recorded(settings), provenance(command))

    def train(self, interrupt: StopSignal) -> Outcome:
        """To its end; what cannot be probed is refused."""
        while True:
            interrupt.check()
            match self._engine.next_event(POLL_SECONDS):
                case SlotsEvent(worker=worker):
                    self._go_on(worker)
                case ProbedEvent(facts=None, message=message):
                    return Outcome(cause="refused", message=message)
                case CheckedEvent(size=None, refusal=Outcome() as refusal):
                    return refusal
                case CheckedEvent(size=size):
                    self._size = size
                case ProbedEvent(facts=facts):
                    self._know(facts)
                case EvaluatedEvent() as event:
                    self._tracker.ship(self.record)
                    done = f"step {event.step} of {event.total_steps}"
                    judged = metric_words(self._settings.objective.judged_while_training)
                    self._console.print(f"{done}: {judged} {event.value:.4f}", highlight=False)
                case EndedEvent(outcome=outcome):
                    return outcome
                case LostEvent(cause=cause, message=message):
                    return Outcome(cause=cause, message=message)

    def _go_on(self, worker: int) -> None:
        """Use a free slot: for what is not known yet, then for the trial itself."""
        if self._facts is None:
            self._engine.probe(worker, ProbeCommand(arm="single", settings=self._settings))
        elif self._size is None:
            self._engine.probe(worker, CheckCommand(settings=self._settings))
        else:
            self._submit(worker, self._size)

    def _know(self, facts: ArmBaseline | None) -> None:
        assert facts is not None
        self._facts = facts
        self.record = replace(
            self.record,
            tags=origin(self.record.tags, facts),
            dataset=dataset_record(facts, self._settings.data),
        )
        self._console.print(f"data: {describe_data(facts)}", highlight=False, soft_wrap=True)
        metric = self._settings.objective.metric
        value = facts.base_value(metric)
        self._console.print(f"untuned base: {metric_words(metric)} {value:.4f}", highlight=False)
        self._accept(facts)

    def _submit(self, worker: int, size: TrialSize) -> None:
        self.record = replace(self.record, params=recorded(self._settings, size))
        self._tracker.start(self.record)
        self._engine.submit(
            worker,
            SubmitCommand(
                trial=self.record.key,
                attempt=1,
                folder=self.record.folder.path.resolve(),
                settings=self._settings.with_rank(size.rank),
                provenance=dict(self.record.tags),
            ),
        )
