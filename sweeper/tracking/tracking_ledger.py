"""Small files in a study's folder that say what MLflow must record and what it has recorded.

The driver writes entries, and the shipping process writes marks. Every file is written atomically, so
shipping can be interrupted at any moment, also by kill -9, and continued by another process.
Independent of MLflow.

    outputs/lr_rank_sweep/.tracking/
      store.json             address of the MLflow store
      study.json             entry of the parent run     shipped/study.json      its mark
      runs/lora/0007.json    entry of a child run        shipped/lora/0007.json  its mark
      lock                   held by the process that ships
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from sweeper.core.manifest import MANIFEST
from sweeper.core.paths import TrialFolder, path_inside, write_atomic
from sweeper.core.references import referenced_tree
from sweeper.core.spool import read_spool
from sweeper.core.stored_files import damage
from sweeper.core.value import FrozenValue
from sweeper.tracking.tracker import DatasetRecord, RunStatus

STUDY = "study"
"""Key of the parent run. Keys of trials contain a slash."""
STATE, WEIGHTS = "state", "weights"
"""Parts of a run: the final state, which is shipped after all other parts, and the kept weights."""
OPENED = 0
"""Time in the mark of parts that do not depend on the run's end."""

NOTE_LENGTH = 8000
"""Maximum characters of a run's description in MLflow."""
NOTHING: Mapping[str, Any] = {}

KEY = re.compile(r"[\w-]+(/[\w-]+)+")
"""Keys of trials: lora/0007, single/FOLDER, lora/0007_2, lora/0003_seed_1."""

Stored = TypeVar("Stored", bound=FrozenValue)


class RunEnding(FrozenValue):
    """The end of a run. Its metrics are shipped with its time, so a repeat sends the same points."""

    status: RunStatus
    metrics: dict[str, float]
    tags: dict[str, str]
    time_ms: int

    def or_equal(self, *others: RunEnding | None) -> RunEnding:
        """Return the first of `others` that equals this end except for the time, else this end."""
        # A resumed study that changes nothing keeps the old time, so nothing is shipped again
        now = {"time_ms": self.time_ms}
        known = (other for other in others if other is not None)
        return next((other for other in known if other.model_copy(update=now) == self), self)


def ending(
    status: RunStatus, metrics: Mapping[str, float] = NOTHING, tags: Mapping[str, str] = NOTHING
) -> RunEnding:
    """Return a run's end with the current time."""
    return RunEnding(status=status, metrics=dict(metrics), tags=dict(tags), time_ms=now_ms())


def study_ending(
    status: RunStatus, metrics: Mapping[str, float], best: Mapping[str, Any], note: str
) -> RunEnding:
    """Return the end of a parent run.

    Args:
        status: the final state.
        metrics: the best trial's metrics and the verdict's figures.
        best: the best trial's point.
        note: the answer in Markdown, which becomes the run's description.
    """
    # Tags, because MLflow's parameters cannot change, but an extended study may find a better trial
    tags = as_texts({f"best.{name}": value for name, value in best.items()})
    if note:
        tags["mlflow.note.content"] = _shorten(note)
    return ending(status, metrics, tags)


def _shorten(note: str) -> str:
    """Cut a description to MLflow's limit, at the end of a line."""
    return note if len(note) <= NOTE_LENGTH else note[:NOTE_LENGTH].rpartition("\n")[0]


def as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as strings, like MLflow's params and tags."""
    return {name: str(value) for name, value in values.items()}


def now_ms() -> int:
    """Return the time in Unix milliseconds, MLflow's unit."""
    return int(time.time() * 1000)


class RunAmendment(FrozenValue):
    """Metrics that were measured after a trial's end."""

    metrics: dict[str, float]
    time_ms: int


class TrialEntry(FrozenValue):
    """The intended state of a child run."""

    key: str
    uid: str
    """Tag by which a trial without a study is found if the response to its creation was lost."""
    folder: str
    """The trial's folder, relative to the study's."""
    params: dict[str, str]
    tags: dict[str, str]
    dataset: DatasetRecord | None = None
    started_ms: int
    aside: bool = False
    """True if the folder was set aside, because it did not belong to the trial of this key."""
    kept: bool = False
    """True if the trial's weights are kept and must be uploaded."""
    amendments: tuple[RunAmendment, ...] = ()
    ending: RunEnding | None = None
    """End of the run, or None while the trial runs."""
    before: RunEnding | None = None
    """Previous end of a run that was reopened."""

    def reopened(self) -> TrialEntry:
        """Return the entry of a run that ended and continues."""
        return self.model_copy(update={"ending": None, "before": self.ending or self.before})


class StudyEntry(FrozenValue):
    """The intended state of the parent run."""

    uid: str
    """Tag by which the study's runs are found, because other studies may have the same name."""
    experiment: str
    name: str
    metric: str
    direction: str
    params: dict[str, str]
    tags: dict[str, str]
    started_ms: int
    opened_ms: int
    """Time of the latest start of the study."""
    ending: RunEnding | None = None
    before: RunEnding | None = None
    """Previous end of a run that was reopened."""
    artifacts: tuple[str, ...] = ()
    """Files and folders to upload, relative to the study's folder."""


class StoreAddress(FrozenValue):
    """The store that a study's runs are recorded in."""

    uri: str | None
    """The tracking server or database without its password, or None for the local store."""
    root: str
    """Folder of the local store."""


class ShippingMark(FrozenValue):
    """The parts of a run that one store has."""

    store: str
    run: str | None = None
    cursor: dict[str, int] = Field(default_factory=dict)
    """Last step of each metric that the store has."""
    unsure: tuple[str, ...] = ()
    """Parts that were sent without a response yet. A retry first reads what the store has."""
    status: RunStatus | None = None
    """The run's final state in the store."""
    done: dict[str, int] = Field(default_factory=dict)
    """Parts that the store has -> time of the end that they belong to (time_ms)."""


class TrackingLedger:
    """The entries and marks of one study, or of one trial without a study."""

    def __init__(self, folder: Path) -> None:
        """Read the entries in `folder`, a folder inside the study's that need not exist yet."""
        self.folder = folder
        self.problems: list[str] = []
        """Messages about files that could not be read or written."""
        self.store = self._read(folder / "store.json", StoreAddress)
        self.study = self._read(folder / "study.json", StudyEntry)
        paths = sorted((folder / "runs").glob("*/*.json"))
        entries = (self._read(path, TrialEntry) for path in paths)
        self.trials: dict[str, TrialEntry] = {entry.key: entry for entry in entries if entry}

    @property
    def lock(self) -> Path:
        """File that the shipping process locks."""
        return self.folder / "lock"

    @property
    def keys(self) -> list[str]:
        """Keys of all runs, with the parent first."""
        return [STUDY, *self.trials] if self.study else list(self.trials)

    def key_of(self, key: str) -> str:
        """Return the key under which a trial's run is recorded.

        As in "lora/0007", or "lora/0007_2" if the run under the first key was set aside.
        """
        found, number = key, 1
        while (entry := self.trials.get(found)) is not None and entry.aside:
            number += 1
            found = f"{key}_{number}"
        return found

    def trial_folder(self, entry: TrialEntry) -> TrialFolder:
        """Return the folder of an entry's trial."""
        return TrialFolder(self.folder.parent / entry.folder)

    def relative(self, path: Path) -> str:
        """Return a path relative to the study's folder."""
        # Relative, so that the ledger stays valid when the study's folder is moved
        return os.path.relpath(path.resolve(), self.folder.parent.resolve())

    def save_store(self, store: StoreAddress) -> None:
        """Write the address of the store, if it changed."""
        if store != self.store:
            self.store = store
            self._write(self.folder / "store.json", store)

    def save_entry(self, entry: StudyEntry | TrialEntry) -> None:
        """Write an entry. An OSError becomes one of the `problems`."""
        # This process can still ship the entry from memory. Only a later process would miss it
        entry = type(entry).model_validate(referenced_tree(entry.model_dump()))
        if entry.ending is not None and entry.ending.time_ms < entry.started_ms:
            # the clock was set back in between, and MLflow would show a negative duration
            end = entry.ending.model_copy(update={"time_ms": entry.started_ms})
            entry = entry.model_copy(update={"ending": end})
        if isinstance(entry, StudyEntry):
            self.study = entry
            self._write(self.folder / "study.json", entry)
        else:
            self.trials[entry.key] = entry
            self._write(self.folder / "runs" / f"{entry.key}.json", entry)

    def read_mark(self, key: str, store: str) -> ShippingMark:
        """Return the mark of a run for a store. A mark for another store counts as empty."""
        mark = self._read(self._mark_path(key), ShippingMark)
        return mark if mark is not None and mark.store == store else ShippingMark(store=store)

    def save_mark(self, key: str, mark: ShippingMark) -> None:
        """Write the mark of a run."""
        self._write(self._mark_path(key), mark)

    def _mark_path(self, key: str) -> Path:
        return self.folder / "shipped" / f"{key}.json"

    def _read(self, path: Path, kind: type[Stored]) -> Stored | None:
        try:
            found = kind.model_validate_json(path.read_bytes())
            self._require_inside(found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.problems.append(f"{path}: cannot be read ({damage(error)})")
            return None
        return found

    def _require_inside(self, stored: FrozenValue) -> None:
        """Refuse an entry that names files outside the folder of all studies.

        Raises:
            ValueError: names the path. A fork's trials lie in the study that they were made in.
        """
        names = [stored.folder] if isinstance(stored, TrialEntry) else []
        names += stored.artifacts if isinstance(stored, StudyEntry) else []
        if isinstance(stored, TrialEntry) and not KEY.fullmatch(stored.key):
            raise ValueError(f"{stored.key!r} is no trial")
        study = self.folder.parent.resolve()
        for name in names:
            path_inside(study.parent, name, start=study)

    def _write(self, path: Path, value: FrozenValue) -> None:
        try:
            write_atomic(path, value.model_dump_json() + "\n")
        except OSError as error:
            self.problems.append(f"{path}: not stored for a later `sweeper sync` ({error})")


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric."""

    name: str
    step: int
    value: float
    time_ms: int


@dataclass(frozen=True)
class PendingCounts:
    """Numbers of runs, points, files and final states that a store does not have yet."""

    runs: int = 0
    points: int = 0
    files: int = 0
    states: int = 0

    def __add__(self, other: PendingCounts) -> PendingCounts:
        return PendingCounts(
            self.runs + other.runs,
            self.points + other.points,
            self.files + other.files,
            self.states + other.states,
        )

    def __bool__(self) -> bool:
        return self.runs > 0

    def __str__(self) -> str:
        """Return the counts as text: 12 metric points, 3 files and 1 final state of 2 runs."""
        counts = {"metric point": self.points, "file": self.files, "final state": self.states}
        parts = [_counted(count, name) for name, count in counts.items() if count]
        listed = " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)
        return f"{listed or 'the start'} of {_counted(self.runs, 'run')}"


def count_pending(ledger: TrackingLedger, store: str) -> PendingCounts:
    """Count what a store lacks of all runs, according to the marks."""
    return sum((pending(ledger, key, store) for key in ledger.keys), start=PendingCounts())


def pending(ledger: TrackingLedger, key: str, store: str) -> PendingCounts:
    """Count what a store lacks of one run, according to its mark."""
    mark = ledger.read_mark(key, store)
    entry = ledger.study if key == STUDY else ledger.trials[key]
    if entry is None or is_shipped(entry, mark):
        return PendingCounts()
    end = entry.ending
    points, files = 0, 0
    if isinstance(entry, TrialEntry):
        points = len(unshipped_points(read_spool(ledger.trial_folder(entry).metrics), mark.cursor))
        points += sum(len(more.metrics) for more in pending_amendments(entry, mark))
    if end is not None:
        points += len(end.metrics) if mark.done.get("figures") != end.time_ms else 0
        files = len(files_of(ledger, entry)) if mark.done.get("files") != end.time_ms else 0
        if isinstance(entry, TrialEntry) and lacks_weights(entry, mark):
            files += len(weights_of(ledger.trial_folder(entry)))
    elif points == 0 and is_open(entry, mark):  # a running trial of which everything is shipped
        return PendingCounts()
    stated = end is None or mark.done.get(STATE) == end.time_ms
    return PendingCounts(1, points, files, 0 if stated else 1)


def is_shipped(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> bool:
    """Return True if the store has the run's final state, which comes last, and all later additions."""
    end = entry.ending
    if end is None or (mark.done.get(STATE), mark.status) != (end.time_ms, end.status):
        return False
    return not lacks_weights(entry, mark) and not pending_amendments(entry, mark)


def pending_amendments(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> list[RunAmendment]:
    """Return the amendments that the store does not have."""
    amendments = entry.amendments if isinstance(entry, TrialEntry) else ()
    return [
        more
        for number, more in enumerate(amendments)
        if mark.done.get(f"amendment {number}") != more.time_ms
    ]


def lacks_weights(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> bool:
    """Return True if a trial's weights must be uploaded and the store does not have them."""
    if isinstance(entry, StudyEntry) or entry.ending is None or not entry.kept:
        return False
    return mark.done.get(WEIGHTS) != entry.ending.time_ms


def is_open(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> bool:
    """Return True if the store has the run in the state RUNNING."""
    opened = isinstance(entry, TrialEntry) or mark.done.get("opened") == entry.opened_ms
    return opened and mark.run is not None and mark.status is None


def unshipped_points(
    rows: Sequence[Mapping[str, Any]], cursor: Mapping[str, int]
) -> list[MetricPoint]:
    """Return the points of a spool that are later than the cursor, in order.

    Args:
        rows: the spool.
        cursor: last step of each metric that the store has.
    """
    # At most one point per metric and step. A step that was repeated after a crash has equal values
    last = dict(cursor)
    points: list[MetricPoint] = []
    for row in rows:
        step = int(row["step"])
        for name, value in row.items():
            if name not in ("step", "time") and step > last.get(name, -1):
                points.append(MetricPoint(name, step, value, int(row.get("time", 0.0) * 1000)))
                last[name] = step
    return points


def files_of(ledger: TrackingLedger, entry: StudyEntry | TrialEntry) -> list[Path]:
    """Return the existing small files to upload at the end of a run."""
    if isinstance(entry, StudyEntry):
        listed = [ledger.folder.parent / name for name in entry.artifacts]
        return [file for path in listed for file in _files_at(path)]
    folder = ledger.trial_folder(entry)
    small = (
        *(folder.config, folder.outcome, folder.provenance),
        *(folder.log_text, folder.log_json, folder.data_card),
        *(folder.samples, folder.samples.with_suffix(".json")),
    )
    return [path for path in small if path.exists()]


def _files_at(path: Path) -> list[Path]:
    """Return the file at `path`, or the files in the folder at `path`, if any."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return [path] if path.exists() else []


def weights_of(folder: TrialFolder) -> list[Path]:
    """Return an adapter's archive and files, with the manifest last."""
    # A reader who finds the manifest finds all files. Full weights, which are as large as the base, stay
    # in the trial's folder, whose path is a tag of the run
    files = [path for path in folder.adapter.rglob("*") if path.is_file()]
    ordered = sorted(files, key=lambda path: (path.name == MANIFEST, path))
    archive = folder.adapter.with_suffix(".zip")
    return [archive, *ordered] if archive.exists() else ordered


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
