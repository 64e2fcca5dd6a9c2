"""MLflow behind the Tracker protocol: one thread, one client, idempotent by tags and timestamps.

Runs are found again by their tags, so that a resumed study continues its runs; metric points carry
the time they were measured, so that a point sent twice is one row in MLflow's store.
"""

from __future__ import annotations

import getpass
import itertools
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper.folders import TrialFolder
from sweeper.redaction import redact
from sweeper.settings import EMBEDDED
from sweeper.tracking.logged_models import STUDY_TAG, TRIAL_TAG, log_models, register
from sweeper.tracking.tracker import (
    DatasetRecord,
    ModelRecord,
    RunStatus,
    StudyEnd,
    StudyRecord,
    TrialRecord,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

EVERY_TRIAL_HAS = ("eval/loss", "minimize")
PARENT_TAG = "mlflow.parentRunId"
OUTAGE_SETTINGS = {
    # MLflow's own defaults keep one call waiting for 246 seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)
"""Waits between tries while the server is away; the last one is repeated."""
CLOSE_SECONDS = 10.0
"""How long the end of a study waits for a server that is away; what is left is said."""
AWAY = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"})
"""MLflow's error codes for a server that may answer later."""
NOTE_CHARS = 8000
"""The longest tag that MLflow's SQL store takes, and a description is a tag."""
DIGEST_CHARS = 36
"""The longest digest of a dataset that it takes."""
BATCH = 1000
"""MLflow takes at most this many metrics a request."""


def local_uri(root: Path) -> str:
    """The store under a folder: one SQLite file, artifacts beside it."""
    return f"sqlite:///{root / 'mlflow.db'}"


class MlflowTracker:
    """Every call returns at once; the work is done in order in one background thread."""

    def __init__(self, uri: str | None, root: Path, registered_model: str | None = None) -> None:
        """Connect in the background.

        Args:
            uri: a tracking server or database; without one the store is local.
            root: where a local store is kept.
            registered_model: of which a study's best adapter becomes a version; None: of none.
        """
        self._uri = uri
        self._registered_model = registered_model
        self._root = root
        self._problems: list[str] = []
        self._runs: dict[str, str] = {}
        self._final: set[str] = set()
        self._experiment = ""
        self._study: dict[str, str] = {}
        self._announced: StudyRecord | None = None
        self._away = False
        self._closing = threading.Event()
        self._give_up_at = math.inf
        self._parent: str | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._client: Future[MlflowClient] = self._pool.submit(self._connect)

    def open_study(self, study: StudyRecord) -> None:
        """See Tracker."""
        self._announced = study
        self._later(f"study {study.name}", lambda client: self._open_study(client, study))

    def start(self, trial: TrialRecord) -> None:
        """See Tracker."""
        self._later(f"start of {trial.key}", lambda client: self._start(client, trial))

    def ship(self, trial: TrialRecord) -> None:
        """See Tracker."""
        self._later(f"metrics of {trial.key}", lambda client: self._ship(client, trial))

    def end(
        self,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """See Tracker."""
        self._later(
            f"end of {trial.key}", lambda client: self._end(client, trial, status, metrics, tags)
        )

    def close_study(self, end: StudyEnd) -> None:
        """See Tracker."""
        self._later("the parent run", lambda client: self._close_study(client, end))
        if end.models:
            self._later("the best adapters", lambda client: self._log_models(client, end.models))

    def close(self) -> list[str]:
        """See Tracker."""
        self._give_up_at = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        self._pool.shutdown(wait=True)
        return list(dict.fromkeys(self._problems))

    def _connect(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name, value in OUTAGE_SETTINGS.items():
            os.environ.setdefault(name, value)
        import mlflow  # two seconds, and not needed before the first trial is on its way

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self._uri is None:
            self._root.mkdir(parents=True, exist_ok=True)
        return mlflow.MlflowClient(self._uri or local_uri(self._root))

    def _later(self, what: str, work: Callable[[MlflowClient], None]) -> None:
        self._pool.submit(self._try, what, work)

    def _try(self, what: str, work: Callable[[MlflowClient], None]) -> None:
        """Until it is done: a server that is away is waited for, in a thread nobody else waits for."""
        waits = itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1]))
        while not (self._away and time.monotonic() > self._give_up_at):
            try:
                work(self._client.result())
                self._away = False
                return
            except Exception as error:  # noqa: BLE001 - the tracker's edge: an outage stops no training
                self._away = getattr(error, "error_code", None) in AWAY
                if not self._away:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    self._problems.append(f"{what}: {redact(reason)}")
                    return
            if self._closing.wait(next(waits)):
                time.sleep(RETRY_SECONDS[0])  # the event is set: it waits no more
        self._problems.append(f"{what}: the server is away")

    def _open_study(self, client: MlflowClient, study: StudyRecord) -> None:
        self._experiment = self._experiment_id(
            client, study.experiment, study.objective.metric, study.objective.direction
        )
        self._study = {STUDY_TAG: study.name}
        query = f"tags.`{STUDY_TAG}` = '{study.name}'"
        runs = list(_search(client, self._experiment, query))
        parents = [run for run in runs if TRIAL_TAG not in run.data.tags]
        if parents:
            self._parent = parents[0].info.run_id
            client.update_run(self._parent, status="RUNNING")
            for name, value in study.tags.items():
                client.set_tag(self._parent, name, value)
        else:
            tags = {**self._study, **study.tags, **_source_tags(study.tags)}
            run = client.create_run(self._experiment, run_name=study.name, tags=tags)
            self._parent = run.info.run_id
            _log_params(client, self._parent, study.params)
        for run in runs:
            if key := run.data.tags.get(TRIAL_TAG):
                self._runs[key] = run.info.run_id
                if run.info.status != "RUNNING":
                    self._final.add(key)

    def _close_study(self, client: MlflowClient, end: StudyEnd) -> None:
        parent = self._parent_of(client)
        _log_final(client, parent, end.metrics)
        if end.dataset is not None:
            _log_dataset(client, parent, end.dataset)
        if end.note:
            client.set_tag(parent, "mlflow.note.content", _cut(end.note))
        for name, value in end.best.items():
            client.set_tag(parent, f"best.{name}", str(value))
        for path in end.artifacts:
            if path.is_dir():
                client.log_artifacts(parent, str(path), path.name)
            else:
                client.log_artifact(parent, str(path))
        client.set_terminated(parent, end.status)

    def _log_models(self, client: MlflowClient, models: Sequence[ModelRecord]) -> None:
        study = self._study[STUDY_TAG]
        made = log_models(client, self._experiment, study, models, self._runs)
        if self._registered_model is not None:
            best = models[0].trial
            register(client, self._registered_model, study, best, made[0], self._runs[best])

    def _parent_of(self, client: MlflowClient) -> str:
        """The parent run; opened now if the server was away when the study began."""
        if self._parent is None:
            assert self._announced is not None, "no study was announced"
            self._open_study(client, self._announced)
        assert self._parent is not None
        return self._parent

    def _experiment_id(self, client: MlflowClient, name: str, metric: str, direction: str) -> str:
        found = client.get_experiment_by_name(name)
        location = None
        if self._uri is None:  # MLflow would take the current folder of whoever comes first
            location = (self._root / "artifacts" / name).resolve().as_uri()
        known = {} if found is None else found.tags
        identity = (
            str(client.create_experiment(name, artifact_location=location))
            if found is None
            else str(found.experiment_id)
        )
        for tag, value in _experiment_tags(metric, direction).items():
            if tag not in known:  # somebody may have made the experiment, or chosen otherwise since
                client.set_experiment_tag(identity, tag, value)
        return identity

    def _start(self, client: MlflowClient, trial: TrialRecord) -> None:
        if trial.key in self._runs:
            client.update_run(self._runs[trial.key], status="RUNNING")
            self._final.discard(trial.key)
            return
        tags = {TRIAL_TAG: trial.key, **trial.tags, **_source_tags(trial.tags)}
        if self._announced is None:
            self._experiment = self._experiment_id(client, "single trials", *EVERY_TRIAL_HAS)
        else:
            tags |= {PARENT_TAG: self._parent_of(client), **self._study}
        run = client.create_run(self._experiment, run_name=trial.key, tags=tags)
        self._runs[trial.key] = run.info.run_id
        _log_params(client, run.info.run_id, trial.params)
        if trial.dataset is not None:
            _log_dataset(client, run.info.run_id, trial.dataset)

    def _ship(self, client: MlflowClient, trial: TrialRecord) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, int(line["time"] * 1000), int(line["step"]))
            for line in _spool(trial.folder)
            for name, value in line.items()
            if name not in ("time", "step")
        ]
        for start in range(0, len(points), BATCH):
            client.log_batch(self._runs[trial.key], metrics=points[start : start + BATCH])

    def _end(
        self,
        client: MlflowClient,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        if trial.key in self._final:
            return
        if trial.key not in self._runs:
            self._start(client, trial)
        run = self._runs[trial.key]
        self._ship(client, trial)
        _log_final(client, run, metrics)
        for name, value in tags.items():
            client.set_tag(run, name, value)
        _log_artifacts(client, run, trial.folder)
        client.set_terminated(run, status)
        self._final.add(trial.key)


def _experiment_tags(metric: str, direction: str) -> dict[str, str]:
    """The UI opens on runs and their metrics rather than on traces, and charts this metric first."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": metric.replace("eval/", "best/eval_"),
        "mlflow.experiment.primaryMetric.greaterIsBetter": str(direction == "maximize").lower(),
    }


def _source_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """MLflow's own columns for where a run comes from: its UI shows and searches them."""
    found = {"mlflow.source.name": tags.get("command"), "mlflow.source.type": "LOCAL"}
    commit = tags.get("git.commit", "")
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        found["mlflow.source.git.commit"] = commit
    try:
        found["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        pass
    return {name: value for name, value in found.items() if value is not None}


def _cut(note: str) -> str:
    """A description that MLflow takes, ending at the end of a line."""
    return note if len(note) <= NOTE_CHARS else note[:NOTE_CHARS].rpartition("\n")[0]


def _log_dataset(client: MlflowClient, run: str, dataset: DatasetRecord) -> None:
    """The data as the run's input, under MLflow's own kinds of sources."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind, source = _dataset_source(dataset.sources)
    entity = Dataset(
        name=dataset.name[:500],
        digest=dataset.digest[:DIGEST_CHARS],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(dataset.profile),
    )
    client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def _dataset_source(paths: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Type and content as mlflow.data writes them, so that its get_source reads them."""
    if len(paths) > 1:
        return "external", {"uris": list(paths)}  # a mixture: mlflow.data has no word for it
    (path,) = paths
    if path == EMBEDDED:
        return "code", {"tags": {"mlflow.source.name": "sweeper.embedded"}}
    if path.startswith(("http://", "https://")):
        return "http", {"url": redact(path)}
    if "://" in path or Path(path).exists():
        return "local", {"uri": redact(path)}
    return "hugging_face", {"path": path}


def _search(client: MlflowClient, experiment: str, query: str) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = client.search_runs([experiment], filter_string=query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _spool(folder: TrialFolder) -> Iterator[dict[str, Any]]:
    """The complete lines of metrics.jsonl; a line still being written comes with the next shipment."""
    if not folder.metrics.exists():
        return
    for line in folder.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _log_params(client: MlflowClient, run: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run, params=[Param(name, str(value)) for name, value in params.items()])


def _log_final(client: MlflowClient, run: str, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()])


def _log_artifacts(client: MlflowClient, run: str, folder: TrialFolder) -> None:
    """The small files and the adapter; full weights stay in the trial folder, whose path is a tag."""
    for path in (
        *(folder.config, folder.outcome, folder.provenance),
        *(folder.log_text, folder.log_json, folder.data_card),
        *(folder.samples, folder.samples.with_suffix(".json"), folder.archive),
    ):
        if path.exists():
            client.log_artifact(run, str(path))
    if folder.adapter.is_dir():
        client.log_artifacts(run, str(folder.adapter), "adapter")
    client.set_tag(run, "folder", str(folder.path))
