"""The Tracker for MLflow: the driver's calls write entries to disk, and a thread ships them.

A call writes one small file and never waits for a network. The thread brings MLflow into agreement with
these files and retries while MLflow is unavailable. It can be interrupted at any moment, because the
next start of the study or `sweeper sync` ships the rest.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from sweeper.core.errors import AccessRefused, TrackingError
from sweeper.core.paths import TrialFolder
from sweeper.tracking.shipment import RunShipper
from sweeper.tracking.tracker import RunStatus, StudyRecord, TrialRecord
from sweeper.tracking.tracking_ledger import (
    STUDY,
    RunAmendment,
    StoreAddress,
    StudyEntry,
    TrackingLedger,
    TrialEntry,
    as_texts,
    count_pending,
    ending,
    now_ms,
    study_ending,
)
from sweeper.tracking.tracking_server import StoreAway, TrackingServer

_LOG = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between retries while the server is unavailable. The last value is repeated."""
CLOSE_SECONDS = 10.0
"""Seconds that the end of a study waits for a server that accepts nothing and does not respond."""
STORE_SECONDS = 60.0
"""Seconds that the end of a study waits for a database, which has no cheap check if it responds."""
SAY_SECONDS = 8.0
"""Seconds after which the end of a study says that it waits for MLflow, before it may give up."""
FIRST_SECONDS = 30.0
"""Seconds that the first trial waits for the store's answer. An unavailable store answers sooner."""
LAST_TRIES = 3
"""Consecutive failures at the end of a study after which the rest is left for later."""


class MlflowTracker:
    """Records runs through entries on disk that one background thread ships, oldest run first."""

    def __init__(self, server: TrackingServer, folder: Path) -> None:
        """Open the ledger in `folder` and start shipping what an earlier process left there."""
        self._ledger = TrackingLedger(folder)
        self._server = server
        name = None if server.uri is None else server.name
        self._store = StoreAddress(uri=name, root=str(server.root.resolve()))
        self._shipper = RunShipper(self._server, self._ledger)
        self._earlier = self._ledger.study
        self._opened = False
        self._due = dict.fromkeys(self._ledger.keys)
        self._changed = threading.Condition()
        self._closing = False
        self._reasons: dict[str, str] = {}
        self._tried = threading.Event()
        """Set when the store has accepted or refused the study's run, or was found unavailable."""
        self._openings = 0
        """Number of times that the study was opened."""
        self._refusal: TrackingError | None = None
        """Reason why the store refuses the study's run for good."""
        # A daemon thread, so the end of the program never waits for a server
        self._thread = threading.Thread(target=self._run_thread, name="mlflow", daemon=True)
        self._thread.start()

    def open_study(self, study: StudyRecord) -> None:
        """Implement Tracker.open_study."""
        before, now = self._ledger.study, now_ms()
        entry = StudyEntry(
            uid=uuid4().hex if before is None else before.uid,
            experiment=study.experiment,
            name=study.name,
            metric=study.objective.metric,
            direction=study.objective.direction,
            # MLflow's parameters cannot change, so a resumed study keeps those of its first start
            params=as_texts(study.params) if before is None else before.params,
            tags=as_texts(study.tags),
            started_ms=now if before is None else before.started_ms,
            opened_ms=now,
            before=None if before is None else before.ending or before.before,
        )
        self._opened = True
        self._ledger.save_store(self._store)
        self._ledger.save_entry(entry)
        with self._changed:
            # From here on the thread ships the new entry. What it ships just now may be the earlier one
            self._openings += 1
            self._tried.clear()
        self._wake(STUDY)

    def require_store(self) -> str | None:
        """Implement Tracker.require_store."""
        self._tried.wait(FIRST_SECONDS)
        refusal = self._refusal
        if refusal is None:
            return self._reasons.get(STUDY)
        if not isinstance(refusal, AccessRefused):
            raise TrackingError(
                f"MLflow ({self._server.name}) refuses to record this study: {refusal}\n"
                "  ways out:\n"
                "    a store of this machine:  MLFLOW_TRACKING_URI=sqlite:///mlruns/mlflow.db\n"
                "    record nothing:           tracking=none"
            )
        return str(refusal)

    def start(self, trial: TrialRecord) -> None:
        """Implement Tracker.start."""
        known = self._known(trial)
        if known is None:
            self._save_entry(self._entry(trial))
        elif known.ending is not None:
            self._save_entry(known.reopened())

    def ship(self, trial: TrialRecord) -> None:
        """Implement Tracker.ship."""
        self._wake(self._ledger.key_of(trial.key))

    def end(
        self,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Implement Tracker.end."""
        known = self._known(trial) or self._entry(trial)
        end = ending(status, metrics, tags).or_equal(known.ending, known.before)
        if end != known.ending:
            self._save_entry(known.model_copy(update={"ending": end}))

    def set_aside(self, trial: TrialRecord, moved_to: TrialFolder) -> None:
        """Implement Tracker.set_aside."""
        known = self._known(trial)
        if known is not None:
            moved = {
                "aside": True,
                "folder": self._ledger.relative(moved_to.path),
                "ending": known.ending or known.before or ending("KILLED"),
            }
            self._save_entry(known.model_copy(update=moved))

    def settle_move(self, trial: TrialRecord, moved_to: TrialFolder) -> None:
        """Implement Tracker.settle_move."""
        known, place = self._known(trial), self._ledger.relative(moved_to.path)
        recorded = any(entry.folder == place for entry in self._ledger.trials.values())
        if known is None or recorded:
            return
        # a run that is younger than the move is the new trial's: the move was made without MLflow
        # (a rename sets a folder's ctime, and leaves its mtime)
        moved_at_ms = moved_to.path.stat().st_ctime * 1000
        if known.started_ms <= moved_at_ms:
            self.set_aside(trial, moved_to)

    def keep(self, folders: Sequence[TrialFolder]) -> None:
        """Implement Tracker.keep."""
        chosen = {self._ledger.relative(folder.path) for folder in folders}
        for trial in list(self._ledger.trials.values()):
            if trial.kept != (trial.folder in chosen):
                self._save_entry(trial.model_copy(update={"kept": trial.folder in chosen}))

    def amend(self, trial: TrialRecord, metrics: Mapping[str, float], measured_at: float) -> None:
        """Implement Tracker.amend."""
        known = self._known(trial) or self._entry(trial)
        more = RunAmendment(metrics=dict(metrics), time_ms=int(measured_at * 1000))
        if more not in known.amendments:
            amendments = (*known.amendments, more)
            self._save_entry(known.model_copy(update={"amendments": amendments}))

    def close_study(
        self,
        status: RunStatus,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        note: str,
        artifacts: Sequence[Path],
    ) -> None:
        """Implement Tracker.close_study."""
        study = self._ledger.study
        assert study is not None, "no study was opened"
        # Marks belong to an end, so an end that equals the previous one ships nothing again
        names = tuple(self._ledger.relative(path) for path in artifacts)
        end = study_ending(status, metrics, params, note).or_equal(study.before)
        self._save_entry(study.model_copy(update={"ending": end, "artifacts": names}))
        self._end_open_trials()

    def keep_ending(self, status: RunStatus) -> None:
        """Implement Tracker.keep_ending."""
        study, earlier = self._ledger.study, self._earlier
        if not self._opened or study is None or study.ending is not None:
            return  # the parent run was not touched, or has its new end
        kept: dict[str, Any] = {"ending": study.before or ending(status)}
        if earlier is not None:
            # another time of opening, so that the earlier tags are shipped again
            kept |= {"tags": earlier.tags, "artifacts": earlier.artifacts, "opened_ms": now_ms()}
        self._save_entry(study.model_copy(update=kept))
        self._end_open_trials()

    def _end_open_trials(self) -> None:
        for trial in list(self._ledger.trials.values()):
            if trial.ending is None:  # started before a crash, and not resumed since
                self._save_entry(trial.model_copy(update={"ending": ending("KILLED")}))

    def close(self, *, hurry: bool = False) -> list[str]:
        """Implement Tracker.close."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._wait_for_thread(hurry)
        return [
            *dict.fromkeys([*self._server.remarks, *self._ledger.problems]),
            *self._describe_unshipped(),
        ]

    def _known(self, trial: TrialRecord) -> TrialEntry | None:
        return self._ledger.trials.get(self._ledger.key_of(trial.key))

    def _entry(self, trial: TrialRecord) -> TrialEntry:
        return TrialEntry(
            key=self._ledger.key_of(trial.key),
            uid=uuid4().hex,
            folder=self._ledger.relative(trial.folder.path),
            params=as_texts(trial.params),
            tags=as_texts(trial.tags),
            dataset=trial.dataset,
            started_ms=now_ms(),
        )

    def _save_entry(self, entry: StudyEntry | TrialEntry) -> None:
        self._ledger.save_store(self._store)
        self._ledger.save_entry(entry)
        self._wake(STUDY if isinstance(entry, StudyEntry) else entry.key)

    def _wake(self, key: str) -> None:
        with self._changed:
            self._due[key] = None
            self._changed.notify()

    def _run_thread(self) -> None:
        """Ship due runs until the tracker is closed. The thread's main function."""
        # Two processes that ship the same ledger could record a point twice
        lock = FileLock(self._ledger.lock)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                if not self._due:
                    return
            try:
                self._ledger.folder.mkdir(parents=True, exist_ok=True)
                with lock.acquire(timeout=RETRY_SECONDS[0]):
                    self._ship_all()
            except (Timeout, OSError) as error:
                other = "another process is shipping this study"
                self._reasons[STUDY] = other if isinstance(error, Timeout) else str(error)
                self._tried.set()
                if self._closing:
                    return

    def _ship_all(self) -> None:
        """Ship runs until none is due. A run that fails goes to the end of the queue."""
        waits, failures = _waits(), 0
        while (key := self._next_key()) is not None:
            opening = self._openings
            try:
                self._shipper.ship(key)
                self._reasons.pop(key, None)
                self._note_tried(key, None, opening)
                waits, failures = _waits(), 0
            except TrackingError as refusal:  # permanent, so a retry would fail as well
                self._reasons[key] = str(refusal)
                self._note_tried(key, refusal, opening)
            except StoreAway as away:
                self._reasons[key] = str(away)
                self._note_tried(key, None, opening)
                failures += 1
                # While the study runs, the thread retries forever. At its end a user waits
                if self._closing and (failures >= LAST_TRIES or not self._server.responds()):
                    return self._give_up()
                self._retry_later(key, next(waits))

    def _note_tried(self, key: str, refusal: TrackingError | None, opening: int) -> None:
        """Note how the store received the study's run, for `require_store`.

        Args:
            key: the shipped run.
            refusal: reason why the store refuses it for good.
            opening: number of openings when its shipment began.
        """
        if key != STUDY:
            return
        # A store that has the run and refuses a part of it records the trials all the same
        has_run = self._ledger.read_mark(STUDY, self._server.name).run is not None
        with self._changed:
            if opening == self._openings:
                self._refusal = None if has_run else refusal
                self._tried.set()

    def _next_key(self) -> str | None:
        with self._changed:
            key = next(iter(self._due), None)
            if key is not None:
                del self._due[key]
            return key

    def _retry_later(self, key: str, wait_s: float) -> None:
        with self._changed:
            self._due.setdefault(key)
            if self._closing:
                self._changed.wait(min(wait_s, RETRY_SECONDS[0]))
            else:
                self._changed.wait_for(lambda: self._closing, wait_s)

    def _give_up(self) -> None:
        with self._changed:
            self._due.clear()

    def _wait_for_thread(self, hurry: bool) -> None:
        """Wait until all runs are shipped, or an unavailable server has accepted nothing for a while."""
        # A slow store that still accepts parts is waited for. `steps` shows that it does
        limit = CLOSE_SECONDS if hurry or self._server.is_http else STORE_SECONDS
        began = since = time.monotonic()
        steps, said = self._shipper.steps, False
        while self._thread.is_alive():
            self._thread.join(timeout=0.1)
            if not said and time.monotonic() - began > SAY_SECONDS:
                said = True
                _LOG.warning("waiting for MLflow (%s) to record the study", self._server.name)
            if time.monotonic() - since < limit:
                continue
            stuck = self._shipper.steps == steps
            away = stuck and not (self._server.is_http and self._server.responds())
            if hurry or away:
                return
            steps, since = self._shipper.steps, time.monotonic()

    def _describe_unshipped(self) -> list[str]:
        """Return one line about the parts that were not shipped with the reasons, or no line."""
        total = count_pending(self._ledger, self._server.name)
        if not total:
            return []
        reasons = dict.fromkeys(self._reasons.values())
        why = ". ".join(itertools.islice(reasons, 2)) or "no time left"
        return [f"{total} ({self._server.name}: {why})"]


def _waits() -> itertools.chain[float]:
    return itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1]))
