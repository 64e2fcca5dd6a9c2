"""Find an earlier full fine-tune by its MLflow run: its weights, parameters and costs.

Supports runs of this program (tags, parameters) and of others (a folder in transformers' layout among
the artifacts). Evaluates nothing, and takes over no metric of the earlier run's evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sweeper.core.errors import TrackingError
from sweeper.core.outcome import BaselineRun, device_seconds
from sweeper.core.paths import TrialFolder
from sweeper.tracking.registry import FOLDER_TAG
from sweeper.tracking.shipment import STUDY_TAG, search_runs
from sweeper.tracking.store import TrackingStore

if TYPE_CHECKING:
    from mlflow import MlflowClient

RATE = "training.learning_rate"
COSTS = ("cost/seconds", "cost/device_seconds", "cost/peak_memory_mib")
"""Metrics of the earlier training that cannot be measured again."""
CONFIG, WEIGHTS, ADAPTER = "config.json", ".safetensors", "adapter_config.json"
MAX_DEPTH = 3
"""Maximum depth of nested folders to search among a run's artifacts."""


class BaselineStore(TrackingStore):
    """A store's runs of full fine-tunes."""

    def find(self, run_id: str, into: Path) -> BaselineRun:
        """Return the full fine-tune of a run, with its model on this machine.

        Args:
            run_id: MLflow's id of the run.
            into: folder for a model that must be downloaded from a server.

        Raises:
            TrackingError: the run does not exist or has no full model, or the store does not answer.
        """
        with self._client() as client:
            run = _run(client, run_id)
            tags, trials = run.data.tags, _arm_trials(client, run)
            rates = {float(each.data.params[RATE]) for each in trials}
            metrics = run.data.metrics
            return BaselineRun(
                run_id=run_id,
                model=_stored_here(tags) or _fetched(client, run_id, into, tags),
                params=dict(run.data.params),
                costs={name: metrics[name] for name in COSTS if name in metrics},
                data_digest=tags.get("data.digest"),
                base_digest=tags.get("base.digest"),
                trials=len(trials),
                rates=tuple(sorted(rates)),
                best_rate=_best_rate(trials),
                seconds=sum(device_seconds(each.data.metrics) for each in trials),
            )


def _run(client: MlflowClient, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"baseline.run_id={run_id}: this MLflow store has no such run. Set tracking.uri or "
            "MLFLOW_TRACKING_URI to the store that the run was recorded in"
        ) from None
    # MLflow returns deleted runs as well
    if run.info.lifecycle_stage != "active":
        raise TrackingError(f"baseline.run_id={run_id}: this run was deleted. Restore it first")
    return run


def _arm_trials(client: MlflowClient, run: Any) -> list[Any]:
    """Return the finished trials of the run's arm, or [] for a run of another program."""
    study, arm = run.data.tags.get(STUDY_TAG), run.data.tags.get("arm")
    if study is None or arm is None:
        return []
    query = f"tags.`{STUDY_TAG}` = '{study}' AND tags.arm = '{arm}' AND status = 'FINISHED'"
    trials = search_runs(client, run.info.experiment_id, query)
    return [
        # Further seeds of finalists are no part of the search
        each
        for each in trials
        if "finalist" not in each.data.tags and RATE in each.data.params
    ]


def _best_rate(trials: list[Any]) -> float | None:
    """Return the learning rate of the best trial by its own objective."""
    valued = []
    for trial in trials:
        params = trial.data.params
        name = params.get("objective.metric", "").replace("eval/", "best/eval_")
        if name in trial.data.metrics:
            sign = 1 if params.get("objective.direction") == "minimize" else -1
            valued.append((sign * trial.data.metrics[name], float(params[RATE])))
    return min(valued)[1] if valued else None


def _stored_here(tags: Mapping[str, str]) -> Path | None:
    """Return the model in the trial's folder, or None if this machine does not have it."""
    # Full weights of our own trials are never uploaded. A tag of the run names the trial's folder
    if FOLDER_TAG not in tags:
        return None
    model = TrialFolder(Path(tags[FOLDER_TAG])).model
    return model.resolve() if (model / CONFIG).exists() else None


def _fetched(client: MlflowClient, run_id: str, into: Path, tags: Mapping[str, str]) -> Path:
    folders = list(_folders(client, run_id))
    for name, files in folders:
        if CONFIG in files and any(file.endswith(WEIGHTS) for file in files):
            into.mkdir(parents=True, exist_ok=True)
            return Path(client.download_artifacts(run_id, name, str(into))).resolve()
    adapter = any(ADAPTER in files for _, files in folders)
    local = f", and {tags[FOLDER_TAG]}/model is missing (deleted?)" if FOLDER_TAG in tags else ""
    raise TrackingError(
        f"baseline.run_id={run_id}: this run has {'an adapter but ' if adapter else ''}no full model: "
        f"no folder with {CONFIG} and *{WEIGHTS} among its artifacts{local}"
    )


def _folders(
    client: MlflowClient, run_id: str, path: str = "", depth: int = 0
) -> Iterator[tuple[str, set[str]]]:
    """Yield each folder of a run's artifacts with the names of its files, outermost first."""
    found = client.list_artifacts(run_id, path or None)
    yield path, {PurePosixPath(item.path).name for item in found if not item.is_dir}
    if depth < MAX_DEPTH:
        for item in found:
            if item.is_dir:
                yield from _folders(client, run_id, item.path, depth + 1)
