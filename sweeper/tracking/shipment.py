"""Bring a run in MLflow into agreement with its entry in the ledger, without recording anything twice.

Every part is marked once the store has it. Metrics are marked as unsure before they are sent. If no
response comes (the server died or this process was killed), the next try first reads what the store
has, because MLflow's SQL store drops a repeated point, but its file store does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sweeper.core.errors import TrackingError
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import read_spool
from sweeper.tracking.run_pages import experiment_tags, log_dataset, show_model, source_tags
from sweeper.tracking.tracker import DatasetRecord
from sweeper.tracking.tracking_ledger import (
    OPENED,
    STATE,
    STUDY,
    WEIGHTS,
    RunAmendment,
    RunEnding,
    ShippingMark,
    StudyEntry,
    TrackingLedger,
    TrialEntry,
    files_of,
    is_shipped,
    unshipped_points,
    weights_of,
)
from sweeper.tracking.tracking_server import (
    StoreAway,
    TrackingServer,
    as_tracking_error,
    is_deleted,
    is_gone,
    lacks_endpoint,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

STUDY_TAG, TRIAL_TAG, UID_TAG = "sweeper.study", "sweeper.trial", "sweeper.uid"
PARENT_TAG = "mlflow.parentRunId"
SINGLE = "single trials"
"""Name of the experiment of trials without a study."""
EVERY_TRIAL_HAS = ("eval/loss", "minimize")
"""Primary metric and direction of trials without a study."""
ACTIVE_ONLY = 1
"""Value of mlflow.entities.ViewType.ACTIVE_ONLY, whose import takes two seconds."""
MODEL_TYPE = "peft adapter"
METRICS_BATCH, TEXTS_BATCH = 1000, 100
"""MLflow's limits for one request: number of metrics, and number of params or tags."""
Item = TypeVar("Item")
UPLOADING = ".artifact.uploading.*"
"""Pattern of the files that killed uploads leave in MLflow's local store."""


class RunShipper:
    """Ships the runs of one ledger to one server. Not thread-safe."""

    def __init__(self, server: TrackingServer, ledger: TrackingLedger) -> None:
        self._server = server
        self._ledger = ledger
        self._experiment: str | None = None
        self._found: dict[str, list[Any]] | None = None
        self._since = 0
        """Start of the oldest runs in `_found`, in Unix milliseconds."""
        self.steps = 0
        """Counter that grows with everything the store accepts, to detect progress."""

    def ship(self, key: str) -> None:
        """Ship the parts of a run's entry that its mark lacks.

        Raises:
            StoreAway: the store is unavailable. Shipped parts are marked.
            TrackingError: the store refuses a part. The other parts were shipped.
        """
        try:
            self._ship(key)
        except Exception as error:  # noqa: BLE001 - mapped here, at the seam
            # The store was replaced by an empty one, or the run was deleted in the UI, so the run is
            # created again
            if is_gone(error) or is_deleted(error):
                self._ledger.save_mark(key, ShippingMark(store=self._server.name))
                self._experiment = self._found = None
            else:
                raise as_tracking_error(error, self._server.name) from None
        else:
            return
        try:
            self._ship(key)
        except Exception as error:  # noqa: BLE001 - mapped here, at the seam
            raise as_tracking_error(error, self._server.name) from None

    def _ship(self, key: str) -> None:
        entry = self._ledger.study if key == STUDY else self._ledger.trials[key]
        assert entry is not None, f"{key} is not in the ledger"
        mark = self._ledger.read_mark(key, self._server.name)
        if not is_shipped(entry, mark):
            RunShipment(self, self._server.client(), entry, mark).run()

    def parent(self) -> str | None:
        """Return the parent run's id, and create the run if needed, or None without a study."""
        if self._ledger.study is None:
            return None
        mark = self._ledger.read_mark(STUDY, self._server.name)
        if mark.run is None:
            return RunShipment(self, self._server.client(), self._ledger.study, mark).open()
        return mark.run

    def experiment(self, client: MlflowClient) -> str:
        """Return the experiment's id, and create the experiment if needed."""
        if self._experiment is None:
            study = self._ledger.study
            name = SINGLE if study is None else study.experiment
            metric, direction = (
                EVERY_TRIAL_HAS if study is None else (study.metric, study.direction)
            )
            self._experiment = self._open_experiment(client, name, metric, direction)
        return self._experiment

    def uid(self, entry: StudyEntry | TrialEntry) -> str:
        """Return the tag value that identifies a run together with its key."""
        return entry.uid if self._ledger.study is None else self._ledger.study.uid

    def find_runs(self, client: MlflowClient, entry: StudyEntry | TrialEntry) -> list[Any]:
        """Return the store's runs of an entry without a mark, oldest first.

        Such runs exist if the response to their creation was lost.
        """
        # A run has its entry's start time, so one query for runs since the oldest entry finds all of
        # them without listing the thousands of runs that a study may have
        key = STUDY if isinstance(entry, StudyEntry) else entry.key
        if self._found is None or entry.started_ms < self._since:
            self._found, self._since = {}, entry.started_ms
            query = f"tags.`{UID_TAG}` = '{self.uid(entry)}' AND start_time >= {self._since}"
            for run in search_runs(client, self.experiment(client), query):
                owner = run.data.tags.get(TRIAL_TAG, STUDY)
                self._found.setdefault(owner, []).append(run)
        return sorted(self._found.get(key, []), key=lambda run: int(run.info.start_time))

    @contextmanager
    def creating_run(self) -> Iterator[None]:
        """Wrap the creation of a run. After a lost response the next try looks for the run."""
        try:
            yield
        except BaseException:  # the store may have created the run after any kind of failure
            self._found = None
            raise

    def save_mark(self, key: str, mark: ShippingMark) -> None:
        """Write the mark after the store accepted something."""
        self.steps += 1
        self._ledger.save_mark(key, mark)

    @property
    def server(self) -> TrackingServer:
        """The server that runs are shipped to."""
        return self._server

    @property
    def ledger(self) -> TrackingLedger:
        """The ledger of the runs."""
        return self._ledger

    def _open_experiment(self, client: MlflowClient, name: str, metric: str, direction: str) -> str:
        found = client.get_experiment_by_name(name)
        if found is not None:
            experiment = str(found.experiment_id)
            if found.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"the experiment {name!r} was deleted. Restore it: {self._restoring(experiment)}"
                )
            _tag_experiment(client, experiment, metric, direction, found.tags)
            return experiment
        location = None
        # MLflow's default depends on the first process's current folder
        if self._server.uri is None:
            location = (self._server.root / "artifacts" / name).resolve().as_uri()
        try:
            experiment = str(client.create_experiment(name, artifact_location=location))
        except Exception:
            # Another study may have created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)
        _tag_experiment(client, experiment, metric, direction, {})
        return experiment

    def _restoring(self, experiment: str) -> str:
        """Return the command that restores a deleted experiment."""
        store = self._server.name
        return (
            f"MLFLOW_TRACKING_URI={store} mlflow experiments restore --experiment-id {experiment}"
        )

    def adopt_trials(self, client: MlflowClient, parent: str) -> None:
        """Make the runs of earlier trials children of a new parent run."""
        for key in self._ledger.trials:
            mark = self._ledger.read_mark(key, self._server.name)
            if mark.run is None:
                continue
            try:
                client.set_tag(mark.run, PARENT_TAG, parent)
            except Exception as error:
                # Such a run is created again, with the new parent, when there is more to ship
                if not (is_gone(error) or is_deleted(error)):
                    raise


class RunShipment:
    """The shipment of one run."""

    def __init__(
        self,
        shipper: RunShipper,
        client: MlflowClient,
        entry: StudyEntry | TrialEntry,
        mark: ShippingMark,
    ) -> None:
        self._shipper = shipper
        self._client = client
        self._entry = entry
        self._key = STUDY if isinstance(entry, StudyEntry) else entry.key
        self._mark = mark
        self._refused: list[str] = []

    def run(self) -> None:
        """Ship all missing parts in order (see RunShipper.ship)."""
        entry, ending = self._entry, self._entry.ending
        run = self.open()
        if is_shipped(entry, self._mark):
            return
        if isinstance(entry, StudyEntry):
            self._ship_part("opened", entry.opened_ms, lambda: self._reopen(run, entry))
        elif ending is None and self._mark.status is not None:
            self._client.update_run(run, status="RUNNING")
            self._save(status=None)
        self._describe(run)
        if isinstance(entry, TrialEntry):
            self._try("metrics", lambda: self._ship_points(run, entry))
        if ending is not None:
            self._ship_part("figures", ending.time_ms, lambda: self._ship_metrics(run, ending))
            self._ship_part(
                "tags", ending.time_ms, lambda: _log_tags(self._client, run, ending.tags)
            )
            self._ship_part("files", ending.time_ms, lambda: self._ship_files(run))
            if isinstance(entry, TrialEntry) and entry.kept:
                self._ship_part(WEIGHTS, ending.time_ms, lambda: self._ship_weights(run, entry))
            self._terminate(run, ending)
        if isinstance(entry, TrialEntry):
            for number, more in enumerate(entry.amendments):
                self._ship_part(
                    f"amendment {number}", more.time_ms, partial(self._ship_metrics, run, more)
                )
        if self._refused:
            raise TrackingError("; ".join(self._refused))

    def _describe(self, run: str) -> None:
        """Ship parameters and data."""
        params, data = self._entry.params, self._dataset()
        self._ship_part("params", OPENED, lambda: _log_params(self._client, run, params))
        if data is not None:
            self._ship_part("inputs", OPENED, lambda: log_dataset(self._client, run, data))

    def _dataset(self) -> DatasetRecord | None:
        """Return a trial's data, or for a study the data of its first trial that has any."""
        if isinstance(self._entry, TrialEntry):
            return self._entry.dataset
        known = (trial.dataset for trial in self._shipper.ledger.trials.values())
        return next((data for data in known if data is not None), None)

    def open(self) -> str:
        """Return the run's id, after finding the run by its tags or creating it if needed."""
        if self._mark.run is not None:
            return self._mark.run
        earlier = self._shipper.find_runs(self._client, self._entry)
        for duplicate in earlier[1:]:  # a run that was created again after a lost response
            if not duplicate.data.metrics:
                self._client.delete_run(duplicate.info.run_id)
        return self._use_existing(earlier[0]) if earlier else self._create()

    def _use_existing(self, run: Any) -> str:
        status = None if run.info.status == "RUNNING" else run.info.status
        # An earlier process may have sent metrics without marking them
        self._save(run=run.info.run_id, unsure=("metrics", "figures"), status=status)
        ending = self._entry.ending
        if ending is not None and status == ending.status and isinstance(self._entry, TrialEntry):
            # The final state is shipped last, so the store has all parts
            self._save(done={STATE: ending.time_ms})
        return str(run.info.run_id)

    def _create(self) -> str:
        entry = self._entry
        study = self._shipper.ledger.study
        own = {UID_TAG: self._shipper.uid(entry)} | ({STUDY_TAG: study.name} if study else {})
        if isinstance(entry, TrialEntry):
            own[TRIAL_TAG] = entry.key
            if (parent := self._shipper.parent()) is not None:
                own[PARENT_TAG] = parent
        name = entry.name if isinstance(entry, StudyEntry) else entry.key
        experiment = self._shipper.experiment(self._client)
        with self._shipper.creating_run():
            run = self._client.create_run(
                experiment,
                entry.started_ms,  # the start time by which `find_runs` finds the run again
                # `own` comes last, because `find_runs` looks for these tags
                {**source_tags(entry.tags), **entry.tags, **own},
                run_name=name,
            )
        self._save(run=run.info.run_id)
        if isinstance(entry, StudyEntry):
            self._shipper.adopt_trials(self._client, str(run.info.run_id))
        return str(run.info.run_id)

    def _reopen(self, run: str, entry: StudyEntry) -> None:
        if self._mark.status is not None and entry.ending is None:
            self._client.update_run(run, status="RUNNING")
            self._save(status=None)
        _log_tags(self._client, run, entry.tags)

    def _ship_points(self, run: str, entry: TrialEntry) -> None:
        """Ship the points of the spool that are later than the cursor."""
        from mlflow.entities import Metric

        rows = read_spool(self._shipper.ledger.trial_folder(entry).metrics)
        found = unshipped_points(rows, self._mark.cursor)
        points = [Metric(point.name, point.value, point.time_ms, point.step) for point in found]
        if not points:
            return
        stored = self._begin_sending(run, "metrics", points, lambda point: (point.key, point.step))
        for batch in _batches(points, METRICS_BATCH):
            new = [point for point in batch if (point.key, point.step) not in stored]
            if new:
                self._client.log_batch(run, metrics=new)
            self._shipper.steps += 1
        self._save(cursor=self._mark.cursor | {point.key: point.step for point in points})
        self._confirm("metrics")

    def _ship_metrics(self, run: str, measured: RunEnding | RunAmendment) -> None:
        """Ship metrics of a run's end or of an amendment, with its time and step 0."""
        from mlflow.entities import Metric

        when = measured.time_ms
        points = [Metric(name, value, when, 0) for name, value in measured.metrics.items()]
        if not points:
            return
        stored = self._begin_sending(
            run, "figures", points, lambda point: (point.key, point.timestamp)
        )
        new = [point for point in points if (point.key, point.timestamp) not in stored]
        for batch in _batches(new, METRICS_BATCH):
            self._client.log_batch(run, metrics=batch)
        self._confirm("figures")

    def _begin_sending(
        self, run: str, part: str, points: Sequence[Metric], identity: Callable[[Metric], Any]
    ) -> set[Any]:
        """Mark metrics as being sent, and return those that an interrupted try has stored already.

        Args:
            run: the run's id.
            part: name of the part in the mark.
            points: the points to send.
            identity: returns what identifies a point in the store.
        """
        if part not in self._mark.unsure:
            self._save(unsure=(*self._mark.unsure, part))
            return set()
        # An earlier try may have stored some of the points
        names = sorted({point.key for point in points})
        histories = [self._client.get_metric_history(run, name) for name in names]
        return {identity(point) for history in histories for point in history}

    def _confirm(self, part: str) -> None:
        self._save(unsure=tuple(name for name in self._mark.unsure if name != part))

    def _ship_files(self, run: str) -> None:
        entry, ledger = self._entry, self._shipper.ledger
        root = ledger.folder.parent
        if isinstance(entry, TrialEntry):
            root = ledger.trial_folder(entry).path
            _log_tags(self._client, run, {"folder": str(root.resolve())})
        self._remove_partial_uploads(run)
        self._upload(run, files_of(ledger, entry), root)

    def _ship_weights(self, run: str, entry: TrialEntry) -> None:
        """Verify and upload the adapter, and create a LoggedModel if the server supports them."""
        folder = self._shipper.ledger.trial_folder(entry)
        if not folder.adapter.is_dir():
            return
        verify_manifest(folder.adapter)
        self._upload(run, weights_of(folder), folder.path)
        if self._shipper.server.holds_models():
            self._ship_logged_model(run, entry, folder)

    def _upload(self, run: str, files: Sequence[Path], root: Path) -> None:
        for path in files:
            subfolder = path.parent.relative_to(root).as_posix()
            self._client.log_artifact(run, str(path), None if subfolder == "." else subfolder)
            self._shipper.steps += 1

    def _ship_logged_model(self, run: str, entry: TrialEntry, folder: TrialFolder) -> None:
        """Upload the adapter as a LoggedModel, which becomes READY after its last file."""
        client, experiment = self._client, self._shipper.experiment(self._client)
        tags = {UID_TAG: self._shipper.uid(entry), TRIAL_TAG: entry.key}
        try:
            if "model" in self._mark.unsure:
                query = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
                found = client.search_logged_models([experiment], filter_string=query)
            else:
                self._save(unsure=(*self._mark.unsure, "model"))
                found = []
            model = (
                found[0]
                if found
                else client.create_logged_model(
                    experiment, _model_name(entry.key), run, tags, dict(entry.params), MODEL_TYPE
                )
            )
        except Exception as error:
            if not lacks_endpoint(error):
                raise
            self._shipper.server.note_missing_models()
            return
        for path in weights_of(folder):
            if folder.adapter not in path.parents:
                continue  # the archive contains the same files
            subfolder = path.parent.relative_to(folder.adapter).as_posix()
            artifact_path = None if subfolder == "." else subfolder
            client.log_model_artifact(model.model_id, str(path), artifact_path)
            self._shipper.steps += 1
        if entry.ending is not None:
            show_model(client, run, model.model_id, entry.ending)
        client.finalize_logged_model(model.model_id, "READY")
        self._confirm("model")

    def _remove_partial_uploads(self, run: str) -> None:
        """Remove partial files of killed uploads from a local store."""
        # Safe, because the ledger's lock makes this process the only one that uploads to the run
        uri = self._client.get_run(run).info.artifact_uri or ""
        if uri.startswith(("file:", "/")):
            for path in Path(uri.removeprefix("file://")).rglob(UPLOADING):
                path.unlink(missing_ok=True)

    def _terminate(self, run: str, ending: RunEnding) -> None:
        """Set the run's final state, even if a part was refused. Mark it only if none was."""
        if self._mark.status != ending.status:
            self._client.set_terminated(run, ending.status, end_time=ending.time_ms)
        done = self._mark.done if self._refused else {**self._mark.done, STATE: ending.time_ms}
        self._save(status=ending.status, done=done)

    def _ship_part(self, name: str, end_ms: int, work: Callable[[], None]) -> None:
        if self._mark.done.get(name) == end_ms:
            return
        if self._try(name, work):
            self._save(done={**self._mark.done, name: end_ms})

    def _try(self, name: str, work: Callable[[], None]) -> bool:
        """Return True if the store accepted a part. A refusal is recorded and stops no other part."""
        try:
            work()
        except Exception as error:
            if is_gone(error) or is_deleted(error):
                raise  # handled by RunShipper.ship, which creates the run again
            ours = as_tracking_error(error, "MLflow")
            if isinstance(ours, StoreAway):
                raise ours from None
            self._refused.append(f"{name}: {ours}")
            return False
        return True

    def _save(self, **changes: Any) -> None:
        self._mark = self._mark.model_copy(update=changes)
        self._shipper.save_mark(self._key, self._mark)


def _tag_experiment(
    client: MlflowClient, experiment: str, metric: str, direction: str, known: Mapping[str, str]
) -> None:
    """Set the tags of an experiment that are missing, and leave tags that a user has set."""
    for tag, value in experiment_tags(experiment, metric, direction).items():
        if tag not in known:
            client.set_experiment_tag(experiment, tag, value)


def _model_name(key: str) -> str:
    """Return a model's name for a key: lora_0007 for lora/0007."""
    # MLflow allows neither a slash nor a dot in a model's name
    return key.replace("/", "_").replace(".", "_")


def search_runs(
    client: MlflowClient, experiment: str, query: str, view: int = ACTIVE_ONLY
) -> Iterator[Any]:
    """Yield all runs of an experiment that match a filter. `view` is an MLflow ViewType."""
    token: str | None = None
    while True:
        page = client.search_runs([experiment], query, run_view_type=view, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    listed = list(items)
    return (listed[start : start + size] for start in range(0, len(listed), size))


def _log_params(client: MlflowClient, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for batch in _batches(params.items(), TEXTS_BATCH):
        client.log_batch(run, params=[Param(name, value) for name, value in batch])


def _log_tags(client: MlflowClient, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for batch in _batches(tags.items(), TEXTS_BATCH):
        client.log_batch(run, tags=[RunTag(name, value) for name, value in batch])
