"""One trial by hand (`python -m sweeper`, `sweeper trial`), through a study's worker and protocol."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from sweeper.config.decisive_settings import settings_digest
from sweeper.config.settings import RunSettings
from sweeper.core.errors import InputsChanged, StudyError, TrialFailed
from sweeper.core.outcome import ArmBaseline, Outcome
from sweeper.core.paths import TrialFolder
from sweeper.core.quiet import silence_libraries
from sweeper.core.signals import deferred_interrupt
from sweeper.core.stored_files import read_words
from sweeper.core.trial_identity import TrialIdentity, write_identity
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.folder_claims import contradictions
from sweeper.driver.job_waits import JobWaits
from sweeper.driver.single_trial import SingleTrial
from sweeper.driver.trial_sizes import recorded
from sweeper.driver.worker_pool import WorkerPool
from sweeper.reporting.console import PlainConsole, make_console
from sweeper.search.states import STATES
from sweeper.tracking.provenance import provenance
from sweeper.tracking.tracker import TrialRecord
from sweeper.tracking.tracker_factory import browse_command, make_tracker
from sweeper.workers.engines import open_engine


def run_single(settings: RunSettings, folder: TrialFolder, command: str) -> Outcome:
    """Train one trial and print its log. See `train_single`.

    Raises:
        StudyError: the folder is used.
        TrialFailed: it ended without a result: refused, out of memory, diverged, a crash, an error.
        KeyboardInterrupt: the user stopped it.
    """
    if settings.verbosity != "verbose":
        silence_libraries()
    console = make_console()
    quiet = settings.verbosity == "quiet"
    outcome = train_single(
        settings, folder, command, PlainConsole(quiet=True) if quiet else console
    )
    if folder.log_text.exists() and not quiet:  # a fake trial writes none
        console.print(read_words(folder.log_text), highlight=False)
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
        folder: the trial's folder, which must not hold a trial already.
        command: the user's command line, for the record.
        console: every evaluation is printed there.
        accept: called with the facts about data and base. It raises to end before training.

    Raises:
        StudyError: the folder is used.
        TrialFailed: it ended without a result: refused, out of memory, diverged, a crash, an error.
        KeyboardInterrupt: the user stopped it.
    """
    if folder.outcome.exists():
        raise StudyError(f"{folder.path} holds a trial already. Give another folder")
    record = TrialRecord(
        f"single/{folder.path.name}", folder, recorded(settings.trial), provenance(command)
    )
    tracker = make_tracker(settings.tracking, folder.tracking)
    trial = SingleTrial(record, settings.trial, tracker, console)
    stopped: KeyboardInterrupt | TrialFailed | None = None
    try:
        with deferred_interrupt() as interrupt, WorkerPool() as pool:
            say = _announcer(console)
            pool.host_with(
                open_engine(
                    settings.workers,
                    1,
                    lambda worker: folder.path / f"worker_{worker}.log",
                    settings.training.devices_per_trial,
                    say,
                )
            )
            waits = JobWaits(say, settings.workers, announce_trial=say)
            dispatcher = Dispatcher(pool, interrupt, say, waits=waits)
            outcome = trial.run(dispatcher, lambda facts: _accept(facts, trial, accept))
    # raised again below, when the tracker has recorded the end
    except KeyboardInterrupt as stop:
        outcome, stopped = Outcome(cause="cancelled"), stop
    except InputsChanged as changed:
        outcome, stopped = Outcome(cause="cancelled"), _with_ways_out(changed)
    status = STATES[outcome.cause].status or "FAILED"
    tracker.end(trial.record, status, outcome.metrics, {"cause": outcome.cause})
    if status == "FINISHED":
        tracker.keep([folder])
    for problem in tracker.close(hurry=stopped is not None):
        console.print(f"not recorded in MLflow: {problem}", style="yellow")
    if stopped is not None:
        raise stopped
    if status != "FINISHED":
        raise TrialFailed(f"the trial ended as {outcome.cause}: {outcome.message}")
    return outcome


def _accept(facts: ArmBaseline, trial: SingleTrial, accept: Callable[[ArmBaseline], None]) -> None:
    """Refuse a folder in which another trial was begun, then ask the caller.

    Raises:
        StudyError: the folder holds the work of another trial.
    """
    folder = trial.record.folder
    identity = TrialIdentity(
        study=None,
        trial=None,
        seed=trial.settings.seed,
        settings=settings_digest(trial.settings),
        inputs=facts.inputs.of_training,
    )
    if reasons := contradictions(folder, identity):
        raise StudyError(
            f"{folder.path} holds the beginning of another trial ({', '.join(reasons)}). "
            "Give another folder"
        )
    accept(facts)
    write_identity(folder, identity)


def _with_ways_out(changed: InputsChanged) -> TrialFailed:
    return TrialFailed(
        f"trial {changed}\n"
        "  ways out:\n"
        "    continue this trial:    put the earlier files back, and give the same command again\n"
        "    train on the new ones:  give another folder"
    )


def _announcer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
