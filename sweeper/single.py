"""One trial by hand (`python -m sweeper`, `sweeper trial`), through a study's worker and protocol."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from sweeper.errors import TrialFailed
from sweeper.folders import TrialFolder
from sweeper.interrupt import termination_as_interrupt
from sweeper.outcome import Outcome
from sweeper.reporting.view import make_console
from sweeper.search.driver import POLL_SECONDS
from sweeper.search.states import STATES
from sweeper.settings import Settings, TrialSettings, flatten
from sweeper.tracking.provenance import provenance
from sweeper.tracking.tracker import Tracker, TrialRecord
from sweeper.tracking.trackers import browse_command, make_tracker
from sweeper.workers.engines import open_engine
from sweeper.workers.protocol import Ended, Engine, Evaluated, Lost, Slots, Submit


def run_single(settings: Settings, folder: TrialFolder) -> Outcome:
    """Train one trial through the same worker and protocol as a study's.

    Raises:
        TrialFailed: it ended without a result: refused, out of memory, diverged, a crash, an error.
        KeyboardInterrupt: the user stopped it.
    """
    console = make_console()
    facts = provenance("")
    params = flatten(settings.trial.model_dump(mode="json", exclude_none=True))
    record = TrialRecord(f"single/{folder.path.name}", folder, params, facts)
    tracker = make_tracker(settings.tracking)
    engine = open_engine(settings.workers, 1, lambda worker: folder.path / f"worker_{worker}.log")
    try:
        with termination_as_interrupt():
            outcome = _train_one(settings.trial, record, facts, engine, tracker, console)
    except KeyboardInterrupt:
        outcome = Outcome(cause="cancelled")
    finally:
        engine.close()
    status = STATES[outcome.cause].status or "FAILED"
    tracker.end(record, status, outcome.metrics, {"cause": outcome.cause})
    problems = tracker.close()
    for problem in problems:
        console.print(f"not recorded in MLflow: {problem}", style="yellow")
    if outcome.cause == "cancelled":
        raise KeyboardInterrupt
    if status != "FINISHED":
        raise TrialFailed(f"the trial ended as {outcome.cause}: {outcome.message}")
    console.print(folder.log_text.read_text(encoding="utf-8"), highlight=False)
    console.print(f"Folder     {folder.path}", highlight=False)
    console.print(f"Browse     {browse_command(settings.tracking)}", highlight=False)
    return outcome


def _train_one(
    settings: TrialSettings,
    record: TrialRecord,
    facts: Mapping[str, str],
    engine: Engine,
    tracker: Tracker,
    console: Console,
) -> Outcome:
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
