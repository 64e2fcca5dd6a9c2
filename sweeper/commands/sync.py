"""`sweeper sync`: record in MLflow what an outage kept back, from the studies' folders.

Runs whose driver was killed get their final state first: Optuna's, if the study's database is in
its folder, else the worker's own outcome, else KILLED. A study that is resumed later reopens its
runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
from filelock import FileLock, Timeout

from sweeper.config.settings import TrackingSettings
from sweeper.config.space import Point
from sweeper.core.errors import StudyError, StudyLocked, SweeperError
from sweeper.core.outcome import Outcome, stored_outcome
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.steady_output import echo
from sweeper.core.stored_files import read_words
from sweeper.reporting.results import load_results
from sweeper.reporting.tracked_metrics import study_figures
from sweeper.search.states import STATES
from sweeper.search.study import open_storage, outcomes_in
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.tracker_factory import destination
from sweeper.tracking.tracking_ledger import (
    RunEnding,
    TrackingLedger,
    TrialEntry,
    count_pending,
    ending,
    study_ending,
)

WHOLE = "MLflow has everything"


@dataclass(frozen=True)
class SyncedStudy:
    """Result for one study."""

    name: str
    words: str
    whole: bool
    """True if MLflow now has all of it."""

    def __str__(self) -> str:
        return f"{self.name}: {self.words}"


def sync(
    names: Sequence[str], output_dir: Path, tracking: TrackingSettings, *, dry_run: bool
) -> Iterator[SyncedStudy]:
    """Ship what MLflow lacks of the studies, one study after the other.

    Args:
        names: studies, or `single/FOLDER` for a trial without one. Empty means all.
        output_dir: the folder that contains the studies.
        tracking: the destination. Without a uri, the destination of each study's last shipment.
        dry_run: count only.

    Raises:
        StudyError: no such study was ever tracked. Lists those that were.
    """
    tracked = [path.parent for path in sorted(output_dir.glob("*/.tracking"))]
    tracked += [path.parent for path in sorted(output_dir.glob("single/*/.tracking"))]
    # The runs of a study that was set aside may not be recorded yet.
    tracked += [path.parent for path in sorted(output_dir.glob("*/set_aside/studies/*/.tracking"))]
    known = {path.relative_to(output_dir).as_posix(): path for path in tracked}
    if unknown := [name for name in names if name not in known]:
        listed = f"tracked there: {', '.join(known)}" if known else "nothing was tracked there"
        raise StudyError(f"{unknown[0]!r}: not tracked under {output_dir}/; {listed}")
    for name in names or known:
        try:
            yield _sync(name, known[name], tracking, dry_run=dry_run)
        # A study that cannot be shipped does not keep the others from it.
        except SweeperError as error:
            yield SyncedStudy(name, str(error), whole=False)


def _sync(name: str, path: Path, tracking: TrackingSettings, *, dry_run: bool) -> SyncedStudy:
    folder = StudyFolder(path)
    with _nobody_runs(name, folder):
        ledger = TrackingLedger(folder.tracking)
        endings = _endings(folder, ledger)
        if not dry_run:
            _settle(folder, ledger, endings)
    # Shipping has a lock of its own, so the study may be started meanwhile.
    server = destination(tracking, ledger)
    missing = count_pending(ledger, server.name)
    if dry_run:
        orphans = f"; {len(endings)} runs of a killed driver would end" if endings else ""
        words = f"{missing} not recorded" if missing else WHOLE
        return SyncedStudy(name, words + orphans, whole=not missing)
    problems = MlflowTracker(server, folder.tracking).close()
    if count_pending(ledger, server.name):
        return SyncedStudy(name, "not recorded: " + "; ".join(problems), whole=False)
    words = f"recorded {missing}" if missing else WHOLE
    return SyncedStudy(name, "; ".join([words, *problems]), whole=True)


@contextmanager
def _nobody_runs(name: str, folder: StudyFolder) -> Iterator[None]:
    """Require that no driver runs the study or trial, since a driver ships as well."""
    single = TrialFolder(folder.path)
    lock = folder.lock if not single.config.exists() else single.lock
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise StudyLocked(f"runs now, and records itself. Sync {name} when it has ended") from None


def _endings(folder: StudyFolder, ledger: TrackingLedger) -> dict[str, RunEnding]:
    """Return the endings of the runs that a killed driver left open."""
    orphans = [entry for entry in ledger.trials.values() if entry.ending is None]
    if not orphans:
        return {}
    told: Mapping[str, Outcome] = {}
    try:
        told = _told(folder)
    except StudyError as error:  # the workers' own outcomes tell as much
        echo(f"{folder.path.name}: {error}", stderr=True)
    return {entry.key: _ending(ledger, entry, told.get(entry.key)) for entry in orphans}


def _ending(ledger: TrackingLedger, entry: TrialEntry, told: Outcome | None) -> RunEnding:
    if told is None:
        told = stored_outcome(ledger.trial_folder(entry))
    if told is None:
        return ending("KILLED")
    return ending(STATES[told.cause].status or "KILLED", told.metrics, {"cause": told.cause})


def _told(folder: StudyFolder) -> Mapping[str, Outcome]:
    """Return the results in Optuna's storage, if the database is in the study's folder."""
    if not folder.database.exists():
        return {}
    storage = open_storage(None, folder)
    outcomes: dict[str, Outcome] = {}
    for name in optuna.get_all_study_names(storage):
        # Optuna's study of an arm is named STUDY/ARM.
        arm = name.rpartition("/")[2]
        found = outcomes_in(optuna.load_study(study_name=name, storage=storage))
        outcomes |= {f"{arm}/{number:04d}": outcome for number, outcome in found.items()}
    return outcomes


def _settle(folder: StudyFolder, ledger: TrackingLedger, endings: Mapping[str, RunEnding]) -> None:
    """Record the endings, and the parent run's ending with the report as far as the study came."""
    for key, end in endings.items():
        ledger.save_entry(ledger.trials[key].model_copy(update={"ending": end}))
    study = ledger.study
    if study is None or study.ending is not None:
        return
    metrics: dict[str, float] = {}
    best: Point = {}
    if folder.results.exists():
        with suppress(StudyError):  # a damaged answer is none
            metrics, best = study_figures(load_results(folder.path.name, folder.path.parent))
    note = read_words(folder.report)
    end = study_ending("KILLED", metrics, best, note)
    names = tuple(ledger.relative(path) for path in folder.answers if path.exists())
    ledger.save_entry(study.model_copy(update={"ending": end, "artifacts": names}))
