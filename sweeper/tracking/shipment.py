"""Bring one run at MLflow into agreement with its entry in the ledger, and nothing twice.

Every step is marked when the store has it. Before metrics are sent the mark says so; if the answer
never came (the server died, this process was killed), the store is asked what it has before anything is
sent again: not every MLflow store drops a point that it holds already.
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
from sweeper.tracking.run_pages import log_dataset, show_model, source_tags
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
    unshipped,
    weights_of,
)
from sweeper.tracking.tracking_server import (
    StoreAway,
    TrackingServer,
    as_ours,
    is_gone,
    lacks_endpoint,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

STUDY_TAG, TRIAL_TAG, UID_TAG = "sweeper.study", "sweeper.trial", "sweeper.uid"
PARENT_TAG = "mlflow.parentRunId"
SINGLE = "single trials"
"""The experiment of trials without a study."""
EVERY_TRIAL_HAS = ("eval/loss", "minimize")
ACTIVE_ONLY = 1
"""mlflow.entities.ViewType.ACTIVE_ONLY, which takes two seconds to import."""
MODEL_TYPE = "peft adapter"
METRICS_BATCH, TEXTS_BATCH = 1000, 100
"""MLflow takes at most this many metrics, and this many params or tags, a request."""
Item = TypeVar("Item")
UPLOADING = ".artifact.uploading.*"
"""What MLflow's local store leaves behind of an upload that was killed."""


class RunShipper:
    """Ships the runs of one ledger to one server; used by one thread."""

    def __init__(self, server: TrackingServer, ledger: TrackingLedger) -> None:
        self._server = server
        self._ledger = ledger
        self._experiment: str | None = None
        self._found: dict[str, list[Any]] | None = None
        self._since = 0
        """When the oldest of the runs was begun that were looked for (ms)."""
        self.steps = 0
        """Grows with everything that the store has taken."""

    def ship(self, key: str) -> None:
        """Do what a run's entry asks for and its mark does not have.

        Raises:
            Away: the store may answer later; what is done is marked.
            TrackingError: the store refuses a part; the other parts were shipped all the same.
        """
        try:
            self._ship(key)
        except Exception as error:  # noqa: BLE001 - mapped here, at the seam
            if is_gone(error):  # the store was made anew: so is the run, once
                self._ledger.keep_mark(key, ShippingMark(store=self._server.name))
                self._experiment = self._found = None
            else:
                raise as_ours(error, self._server.name) from None
        else:
            return
        try:
            self._ship(key)
        except Exception as error:  # noqa: BLE001 - mapped here, at the seam
            raise as_ours(error, self._server.name) from None

    def _ship(self, key: str) -> None:
        entry = self._ledger.study if key == STUDY else self._ledger.trials[key]
        assert entry is not None, f"{key} is not in the ledger"
        mark = self._ledger.mark(key, self._server.name)
        if not is_shipped(entry, mark):
            RunShipment(self, self._server.client(), entry, mark).run()

    def parent(self) -> str | None:
        """The parent run, made now if it is not there; None without a study."""
        if self._ledger.study is None:
            return None
        mark = self._ledger.mark(STUDY, self._server.name)
        if mark.run is None:
            return RunShipment(self, self._server.client(), self._ledger.study, mark).open()
        return mark.run

    def experiment(self, client: MlflowClient) -> str:
        """The id of the experiment, made now if it is not there."""
        if self._experiment is None:
            study = self._ledger.study
            name = SINGLE if study is None else study.experiment
            metric, direction = (
                EVERY_TRIAL_HAS if study is None else (study.metric, study.direction)
            )
            self._experiment = self._open_experiment(client, name, metric, direction)
        return self._experiment

    def uid(self, entry: StudyEntry | TrialEntry) -> str:
        """What a run is found by, together with its key."""
        return entry.uid if self._ledger.study is None else self._ledger.study.uid

    def earlier(self, client: MlflowClient, entry: StudyEntry | TrialEntry) -> list[Any]:
        """Runs of this entry that the store has although no mark says so, the first one first.

        They are there when the answer to their making was lost. A run is made with the start of its
        entry, so those begun before are not asked for: a study may have thousands.
        """
        key = STUDY if isinstance(entry, StudyEntry) else entry.key
        if self._found is None or entry.started_ms < self._since:
            self._found, self._since = {}, entry.started_ms
            query = f"tags.`{UID_TAG}` = '{self.uid(entry)}' AND start_time >= {self._since}"
            for run in search(client, self.experiment(client), query):
                found = run.data.tags.get(TRIAL_TAG, STUDY)
                self._found.setdefault(found, []).append(run)
        return sorted(self._found.get(key, []), key=lambda run: int(run.info.start_time))

    @contextmanager
    def making(self) -> Iterator[None]:
        """Around the making of a run: if its answer is lost, the next try looks for it."""
        try:
            yield
        except BaseException:  # however it ended, the store may have made the run
            self._found = None
            raise

    def keep(self, key: str, mark: ShippingMark) -> None:
        """Remember what the store has taken."""
        self.steps += 1
        self._ledger.keep_mark(key, mark)

    @property
    def server(self) -> TrackingServer:
        """Where it goes."""
        return self._server

    @property
    def ledger(self) -> TrackingLedger:
        """What is to be recorded."""
        return self._ledger

    def _open_experiment(self, client: MlflowClient, name: str, metric: str, direction: str) -> str:
        found = client.get_experiment_by_name(name)
        if found is not None:
            identity = str(found.experiment_id)
            _tag_experiment(client, identity, metric, direction, found.tags)
            return identity
        location = None
        if self._server.uri is None:  # MLflow would take the current folder of whoever comes first
            location = (self._server.root / "artifacts" / name).resolve().as_uri()
        try:
            identity = str(client.create_experiment(name, artifact_location=location))
        except Exception:
            found = client.get_experiment_by_name(name)  # another study was faster
            if found is None:
                raise
            return str(found.experiment_id)
        _tag_experiment(client, identity, metric, direction, {})
        return identity


class RunShipment:
    """One run on its way."""

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
        """All that is missing, in order; see Shipper.ship."""
        entry, ending = self._entry, self._entry.ending
        run = self.open()
        if is_shipped(entry, self._mark):
            return
        if isinstance(entry, StudyEntry):
            self._part("opened", entry.opened_ms, lambda: self._reopen(run, entry))
        elif ending is None and self._mark.status is not None:
            self._client.update_run(run, status="RUNNING")
            self._save(status=None)
        self._describe(run)
        if isinstance(entry, TrialEntry):
            self._try("metrics", lambda: self._points(run, entry))
        if ending is not None:
            self._part("figures", ending.time_ms, lambda: self._figures(run, ending))
            self._part("tags", ending.time_ms, lambda: _log_tags(self._client, run, ending.tags))
            self._part("files", ending.time_ms, lambda: self._files(run))
            if isinstance(entry, TrialEntry) and entry.kept:
                self._part(WEIGHTS, ending.time_ms, lambda: self._weights(run, entry))
            self._terminate(run, ending)
        if isinstance(entry, TrialEntry):
            for number, more in enumerate(entry.amendments):
                self._part(f"amendment {number}", more.time_ms, partial(self._figures, run, more))
        if self._refused:
            raise TrackingError("; ".join(self._refused))

    def _describe(self, run: str) -> None:
        """Parameters and data."""
        params, data = self._entry.params, self._dataset()
        self._part("params", OPENED, lambda: _log_params(self._client, run, params))
        if data is not None:
            self._part("inputs", OPENED, lambda: log_dataset(self._client, run, data))

    def _dataset(self) -> DatasetRecord | None:
        """Of a trial its own; of a study that of its trials, once there is one."""
        if isinstance(self._entry, TrialEntry):
            return self._entry.dataset
        known = (trial.dataset for trial in self._shipper.ledger.trials.values())
        return next((data for data in known if data is not None), None)

    def open(self) -> str:
        """The run's id; it is found by its tags, or made."""
        if self._mark.run is not None:
            return self._mark.run
        earlier = self._shipper.earlier(self._client, self._entry)
        for double in earlier[1:]:  # its answer was lost, and it was made again
            if not double.data.metrics:
                self._client.delete_run(double.info.run_id)
        return self._adopt(earlier[0]) if earlier else self._create()

    def _adopt(self, run: Any) -> str:
        status = None if run.info.status == "RUNNING" else run.info.status
        self._save(run=run.info.run_id, unsure=("metrics", "figures"), status=status)
        ending = self._entry.ending
        if ending is not None and status == ending.status and isinstance(self._entry, TrialEntry):
            self._save(done={STATE: ending.time_ms})  # its final state came last: it is all there
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
        with self._shipper.making():
            run = self._client.create_run(
                experiment,
                entry.started_ms,
                {**source_tags(entry.tags), **entry.tags, **own},
                run_name=name,
            )
        self._save(run=run.info.run_id)
        return str(run.info.run_id)

    def _reopen(self, run: str, entry: StudyEntry) -> None:
        if self._mark.status is not None and entry.ending is None:
            self._client.update_run(run, status="RUNNING")
            self._save(status=None)
        _log_tags(self._client, run, entry.tags)

    def _points(self, run: str, entry: TrialEntry) -> None:
        """What the spool has beyond the cursor; see the module's docstring."""
        from mlflow.entities import Metric

        rows = read_spool(self._shipper.ledger.trial_folder(entry).metrics)
        found = unshipped(rows, self._mark.cursor)
        points = [Metric(point.name, point.value, point.time_ms, point.step) for point in found]
        if not points:
            return
        stored = self._begin(run, "metrics", points, lambda point: (point.key, point.step))
        for batch in _batches(points, METRICS_BATCH):
            new = [point for point in batch if (point.key, point.step) not in stored]
            if new:
                self._client.log_batch(run, metrics=new)
            self._shipper.steps += 1
        self._save(cursor=self._mark.cursor | {point.key: point.step for point in points})
        self._sure("metrics")

    def _figures(self, run: str, measured: RunEnding | RunAmendment) -> None:
        """Figures of the end or of later, at their time and step 0."""
        from mlflow.entities import Metric

        when = measured.time_ms
        points = [Metric(name, value, when, 0) for name, value in measured.metrics.items()]
        if not points:
            return
        stored = self._begin(run, "figures", points, lambda point: (point.key, point.timestamp))
        new = [point for point in points if (point.key, point.timestamp) not in stored]
        for batch in _batches(new, METRICS_BATCH):
            self._client.log_batch(run, metrics=batch)
        self._sure("figures")

    def _begin(
        self, run: str, part: str, points: Sequence[Metric], identity: Callable[[Metric], Any]
    ) -> set[Any]:
        """Mark that metrics are sent; what the store has of them, if an earlier answer was lost."""
        if part not in self._mark.unsure:
            self._save(unsure=(*self._mark.unsure, part))
            return set()
        names = sorted({point.key for point in points})
        histories = [self._client.get_metric_history(run, name) for name in names]
        return {identity(point) for history in histories for point in history}

    def _sure(self, part: str) -> None:
        self._save(unsure=tuple(name for name in self._mark.unsure if name != part))

    def _files(self, run: str) -> None:
        entry, ledger = self._entry, self._shipper.ledger
        root = ledger.folder.parent
        if isinstance(entry, TrialEntry):
            root = ledger.trial_folder(entry).path
            _log_tags(self._client, run, {"folder": str(root.resolve())})
        self._sweep(run)
        self._upload(run, files_of(ledger, entry), root)

    def _weights(self, run: str, entry: TrialEntry) -> None:
        """The adapter, checked first; where the server has them, as a LoggedModel as well."""
        folder = self._shipper.ledger.trial_folder(entry)
        if not folder.adapter.is_dir():
            return
        verify_manifest(folder.adapter)
        self._upload(run, weights_of(folder), folder.path)
        if self._shipper.server.holds_models():
            self._logged_model(run, entry, folder)

    def _upload(self, run: str, files: Sequence[Path], root: Path) -> None:
        for path in files:
            place = path.parent.relative_to(root).as_posix()
            self._client.log_artifact(run, str(path), None if place == "." else place)
            self._shipper.steps += 1

    def _logged_model(self, run: str, entry: TrialEntry, folder: TrialFolder) -> None:
        """READY when all its files are there; an older server has no such thing."""
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
            self._shipper.server.know_no_models()
            return
        for path in weights_of(folder):
            if folder.adapter not in path.parents:
                continue  # the archive holds the same once more
            inside = path.parent.relative_to(folder.adapter).as_posix()
            client.log_model_artifact(model.model_id, str(path), None if inside == "." else inside)
            self._shipper.steps += 1
        if entry.ending is not None:
            show_model(client, run, model.model_id, entry.ending)
        client.finalize_logged_model(model.model_id, "READY")
        self._sure("model")

    def _sweep(self, run: str) -> None:
        """Remove what killed uploads left in a local store; nobody else uploads to this run."""
        uri = self._client.get_run(run).info.artifact_uri or ""
        if uri.startswith(("file:", "/")):
            for path in Path(uri.removeprefix("file://")).rglob(UPLOADING):
                path.unlink(missing_ok=True)

    def _terminate(self, run: str, ending: RunEnding) -> None:
        """The final state, also of a run that lacks a part; only a whole one is marked as done."""
        if self._mark.status != ending.status:
            self._client.set_terminated(run, ending.status, end_time=ending.time_ms)
        done = self._mark.done if self._refused else {**self._mark.done, STATE: ending.time_ms}
        self._save(status=ending.status, done=done)

    def _part(self, name: str, of: int, work: Callable[[], None]) -> None:
        if self._mark.done.get(name) == of:
            return
        if self._try(name, work):
            self._save(done={**self._mark.done, name: of})

    def _try(self, name: str, work: Callable[[], None]) -> bool:
        """Whether the store took it; a refusal keeps no other part from it."""
        try:
            work()
        except Exception as error:
            if is_gone(error):
                raise
            ours = as_ours(error, "MLflow")
            if isinstance(ours, StoreAway):
                raise ours from None
            self._refused.append(f"{name}: {ours}")
            return False
        return True

    def _save(self, **changes: Any) -> None:
        self._mark = self._mark.model_copy(update=changes)
        self._shipper.keep(self._key, self._mark)


def _tag_experiment(
    client: MlflowClient, identity: str, metric: str, direction: str, known: Mapping[str, str]
) -> None:
    """Give an experiment the tags that it lacks: somebody may have made it, or chosen otherwise."""
    for tag, value in _experiment_tags(metric, direction).items():
        if tag not in known:
            client.set_experiment_tag(identity, tag, value)


def _experiment_tags(metric: str, direction: str) -> dict[str, str]:
    """The UI opens on runs and their metrics rather than on traces, and charts this metric first."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": metric.replace("eval/", "best/eval_"),
        "mlflow.experiment.primaryMetric.greaterIsBetter": str(direction == "maximize").lower(),
    }


def _model_name(key: str) -> str:
    """lora_0007: MLflow allows no slash in a model's name."""
    return key.replace("/", "_").replace(".", "_")


def search(
    client: MlflowClient, experiment: str, query: str, view: int = ACTIVE_ONLY
) -> Iterator[Any]:
    """All runs of an experiment that a filter finds, page by page; `view` is MLflow's ViewType."""
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
