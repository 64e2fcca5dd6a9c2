"""What is to be recorded of a study, and what has been: small files beside its trials.

The driver writes entries, whoever ships them writes marks, each file whole or not at all. So shipping
can be left off at any moment, by kill -9 too, and taken up by another process. Knows no MLflow and
asks no server.

    outputs/lr_rank_sweep/.tracking/
      store.json             where the runs go
      study.json             the parent run as it shall be     shipped/study.json      how far it is
      runs/lora/0007.json    a child run as it shall be        shipped/lora/0007.json  how far it is
      lock                    held by the one process that ships
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from sweeper.core.manifest import MANIFEST
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.core.spool import read_spool
from sweeper.core.value import FrozenValue
from sweeper.tracking.tracker import DatasetRecord, RunStatus

STUDY = "study"
"""The parent run's key; a trial's has a slash in it."""
STATE, WEIGHTS = "state", "weights"
"""Parts of a run: its final state, which says that all before is there; a kept trial's weights."""
OPENED = 0
"""When a part was shipped that belongs to no end."""

NOTE_LENGTH = 8000
"""What MLflow takes as a run's description."""
NOTHING: Mapping[str, Any] = {}

Kept = TypeVar("Kept", bound=FrozenValue)


class RunEnding(FrozenValue):
    """How a run ended; shipped with the time of the end, so that a repeat is the same point."""

    status: RunStatus
    metrics: dict[str, float]
    tags: dict[str, str]
    time_ms: int

    def or_same(self, *others: RunEnding | None) -> RunEnding:
        """This end, or an earlier one that says the same: its time is what makes it another."""
        now = {"time_ms": self.time_ms}
        known = (other for other in others if other is not None)
        return next((other for other in known if other.model_copy(update=now) == self), self)


def ending(
    status: RunStatus, metrics: Mapping[str, float] = NOTHING, tags: Mapping[str, str] = NOTHING
) -> RunEnding:
    """An end that is now."""
    return RunEnding(status=status, metrics=dict(metrics), tags=dict(tags), time_ms=now_ms())


def study_ending(
    status: RunStatus, metrics: Mapping[str, float], best: Mapping[str, Any], note: str
) -> RunEnding:
    """The end of a parent run: the best trial's figures and point, and the answer as its description."""
    tags = texts({f"best.{name}": value for name, value in best.items()})
    if note:
        tags["mlflow.note.content"] = _cut(note)
    return ending(status, metrics, tags)


def _cut(note: str) -> str:
    """A description that MLflow takes, ending at the end of a line."""
    return note if len(note) <= NOTE_LENGTH else note[:NOTE_LENGTH].rpartition("\n")[0]


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as MLflow keeps params and tags."""
    return {name: str(value) for name, value in values.items()}


def now_ms() -> int:
    """MLflow's clock."""
    return int(time.time() * 1000)


class RunAmendment(FrozenValue):
    """Figures that were measured after a trial's end."""

    metrics: dict[str, float]
    time_ms: int


class TrialEntry(FrozenValue):
    """A child run as it shall be."""

    key: str
    uid: str
    """What a trial without a study is found by at a store, if the answer to its making was lost."""
    folder: str
    """Of the trial, relative to the study's."""
    params: dict[str, str]
    tags: dict[str, str]
    dataset: DatasetRecord | None = None
    started_ms: int
    kept: bool = False
    """Its weights stay, and are uploaded."""
    amendments: tuple[RunAmendment, ...] = ()
    ending: RunEnding | None = None
    """None while it runs."""
    before: RunEnding | None = None
    """How it had ended before it was opened again."""

    def reopened(self) -> TrialEntry:
        """The entry of a run that goes on."""
        return self.model_copy(update={"ending": None, "before": self.ending or self.before})


class StudyEntry(FrozenValue):
    """The parent run as it shall be."""

    uid: str
    """What its runs are found by: other people have studies of the same name."""
    experiment: str
    name: str
    metric: str
    direction: str
    params: dict[str, str]
    tags: dict[str, str]
    started_ms: int
    opened_ms: int
    """By the latest process that ran it."""
    ending: RunEnding | None = None
    before: RunEnding | None = None
    """How it had ended before it was opened again."""
    artifacts: tuple[str, ...] = ()
    """Relative to the study's folder."""


class StoreAddress(FrozenValue):
    """Where the runs go."""

    uri: str | None
    """The tracking server or database without its password; None for the local store."""
    root: str
    """Of the local store."""


class ShippingMark(FrozenValue):
    """How far a run has been shipped to one store."""

    store: str
    run: str | None = None
    cursor: dict[str, int] = Field(default_factory=dict)
    """The last step of each metric that the store has."""
    unsure: tuple[str, ...] = ()
    """Parts under way: where the answer never came, the store is asked what it has."""
    status: RunStatus | None = None
    """The run's final state at the store."""
    done: dict[str, int] = Field(default_factory=dict)
    """Parts that the store has, and of which end (time_ms)."""


class TrackingLedger:
    """The entries and marks of one study, or of one trial without a study."""

    def __init__(self, folder: Path) -> None:
        """`folder` lies in the study's folder; it is made when something is written."""
        self.folder = folder
        self.problems: list[str] = []
        """What could not be read or kept, for people."""
        self.store = self._read(folder / "store.json", StoreAddress)
        self.study = self._read(folder / "study.json", StudyEntry)
        paths = sorted((folder / "runs").glob("*/*.json"))
        entries = (self._read(path, TrialEntry) for path in paths)
        self.trials: dict[str, TrialEntry] = {entry.key: entry for entry in entries if entry}

    @property
    def lock(self) -> Path:
        """Held by the process that ships."""
        return self.folder / "lock"

    @property
    def keys(self) -> list[str]:
        """All runs, the parent first."""
        return [STUDY, *self.trials] if self.study else list(self.trials)

    def trial_folder(self, entry: TrialEntry) -> TrialFolder:
        """Where the trial lies."""
        return TrialFolder(self.folder.parent / entry.folder)

    def relative(self, path: Path) -> str:
        """A path as it is kept: the study's folder can be moved as a whole."""
        return os.path.relpath(path.resolve(), self.folder.parent.resolve())

    def keep_store(self, store: StoreAddress) -> None:
        """Remember where the runs go."""
        if store != self.store:
            self.store = store
            self._write(self.folder / "store.json", store)

    def keep(self, entry: StudyEntry | TrialEntry) -> None:
        """Remember an entry; a disk without room costs only what a later process would know."""
        if isinstance(entry, StudyEntry):
            self.study = entry
            self._write(self.folder / "study.json", entry)
        else:
            self.trials[entry.key] = entry
            self._write(self.folder / "runs" / f"{entry.key}.json", entry)

    def mark(self, key: str, store: str) -> ShippingMark:
        """How far a run has been shipped to a store."""
        mark = self._read(self._mark_path(key), ShippingMark)
        return mark if mark is not None and mark.store == store else ShippingMark(store=store)

    def keep_mark(self, key: str, mark: ShippingMark) -> None:
        """Remember how far a run has been shipped."""
        self._write(self._mark_path(key), mark)

    def _mark_path(self, key: str) -> Path:
        return self.folder / "shipped" / f"{key}.json"

    def _read(self, path: Path, kind: type[Kept]) -> Kept | None:
        try:
            return kind.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            self.problems.append(f"{path}: cannot be read ({str(error).splitlines()[0]})")
            return None

    def _write(self, path: Path, value: FrozenValue) -> None:
        try:
            write_atomic(path, value.model_dump_json() + "\n")
        except OSError as error:
            self.problems.append(f"{path}: not kept for a later `sweeper sync` ({error})")


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric."""

    name: str
    step: int
    value: float
    time_ms: int


@dataclass(frozen=True)
class PendingCounts:
    """What a store does not have yet, counted."""

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
        """12 metric points, 3 files and 1 final state of 2 runs."""
        counts = {"metric point": self.points, "file": self.files, "final state": self.states}
        words = [_counted(count, name) for name, count in counts.items() if count]
        listed = " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)
        return f"{listed or 'the opening'} of {_counted(self.runs, 'run')}"


def left(ledger: TrackingLedger, store: str) -> PendingCounts:
    """What a store lacks of all runs, as far as the marks tell."""
    return sum((pending(ledger, key, store) for key in ledger.keys), start=PendingCounts())


def pending(ledger: TrackingLedger, key: str, store: str) -> PendingCounts:
    """What a store lacks of a run."""
    mark = ledger.mark(key, store)
    entry = ledger.study if key == STUDY else ledger.trials[key]
    if entry is None or is_shipped(entry, mark):
        return PendingCounts()
    end = entry.ending
    points, files = 0, 0
    if isinstance(entry, TrialEntry):
        points = len(unshipped(read_spool(ledger.trial_folder(entry).metrics), mark.cursor))
        points += sum(len(more.metrics) for more in lacking_figures(entry, mark))
    if end is not None:
        points += len(end.metrics) if mark.done.get("figures") != end.time_ms else 0
        files = len(files_of(ledger, entry)) if mark.done.get("files") != end.time_ms else 0
        if isinstance(entry, TrialEntry) and lacks_weights(entry, mark):
            files += len(weights_of(ledger.trial_folder(entry)))
    elif points == 0 and is_open(entry, mark):
        return PendingCounts()
    stated = end is None or mark.done.get(STATE) == end.time_ms
    return PendingCounts(1, points, files, 0 if stated else 1)


def is_shipped(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> bool:
    """Whether the run has its final state at the store, and so everything before it."""
    end = entry.ending
    if end is None or (mark.done.get(STATE), mark.status) != (end.time_ms, end.status):
        return False
    return not lacks_weights(entry, mark) and not lacking_figures(entry, mark)


def lacking_figures(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> list[RunAmendment]:
    """Figures of after the end that have still to be sent."""
    amendments = entry.amendments if isinstance(entry, TrialEntry) else ()
    return [
        more
        for number, more in enumerate(amendments)
        if mark.done.get(f"amendment {number}") != more.time_ms
    ]


def lacks_weights(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> bool:
    """Whether weights that are kept have still to be uploaded."""
    if isinstance(entry, StudyEntry) or entry.ending is None or not entry.kept:
        return False
    return mark.done.get(WEIGHTS) != entry.ending.time_ms


def is_open(entry: StudyEntry | TrialEntry, mark: ShippingMark) -> bool:
    """Whether the run is there and runs, as it shall."""
    opened = isinstance(entry, TrialEntry) or mark.done.get("opened") == entry.opened_ms
    return opened and mark.run is not None and mark.status is None


def unshipped(rows: Sequence[Mapping[str, Any]], cursor: Mapping[str, int]) -> list[MetricPoint]:
    """The points of a spool beyond the cursor, in order.

    There is one point a step: one that was measured again, after a crash, is the same by design and is
    not sent again.
    """
    last = dict(cursor)
    points: list[MetricPoint] = []
    for row in rows:
        step = int(row["step"])
        for name, value in row.items():
            if name not in ("step", "time") and step > last.get(name, -1):
                points.append(MetricPoint(name, step, value, int(row["time"] * 1000)))
                last[name] = step
    return points


def files_of(ledger: TrackingLedger, entry: StudyEntry | TrialEntry) -> list[Path]:
    """The small files that a run ends with and that are there."""
    if isinstance(entry, StudyEntry):
        listed = [ledger.folder.parent / name for name in entry.artifacts]
        return [path for place in listed for path in _files_at(place)]
    folder = ledger.trial_folder(entry)
    small = (
        *(folder.config, folder.outcome, folder.provenance),
        *(folder.log_text, folder.log_json, folder.data_card),
        *(folder.samples, folder.samples.with_suffix(".json")),
    )
    return [path for path in small if path.exists()]


def _files_at(place: Path) -> list[Path]:
    """A file, or all files of a folder; none where nothing is."""
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.is_file())
    return [place] if place.exists() else []


def weights_of(folder: TrialFolder) -> list[Path]:
    """An adapter's files, its manifest last: a reader who finds it finds all of them.

    Full weights stay in the trial's folder, whose path is a tag: they are as large as the base.
    """
    files = [path for path in folder.adapter.rglob("*") if path.is_file()]
    ordered = sorted(files, key=lambda path: (path.name == MANIFEST, path))
    archive = folder.adapter.with_suffix(".zip")
    return [archive, *ordered] if archive.exists() else ordered


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
