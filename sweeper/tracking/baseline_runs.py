"""An earlier full fine-tune, found by its MLflow run: its weights, and what is known of its training.

Knows the runs of this program (tags, parameters) and others' (a folder in transformers' layout among
the artifacts). Judges nothing: no figure of the earlier run's own evaluation is taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sweeper.core.errors import TrackingError
from sweeper.core.outcome import BaselineRun, device_seconds
from sweeper.core.paths import TrialFolder
from sweeper.tracking.registry import FOLDER_TAG
from sweeper.tracking.shipment import STUDY_TAG, search
from sweeper.tracking.store import TrackingStore

if TYPE_CHECKING:
    from mlflow import MlflowClient

RATE = "training.learning_rate"
COSTS = ("cost/seconds", "cost/device_seconds", "cost/peak_memory_mib")
"""Of the earlier training: what cannot be measured again."""
CONFIG, WEIGHTS, ADAPTER = "config.json", ".safetensors", "adapter_config.json"
MAX_DEPTH = 3
"""Folders inside each other among a run's artifacts."""


class BaselineStore(TrackingStore):
    """Full fine-tunes that a store knows."""

    def find(self, run_id: str, into: Path) -> BaselineRun:
        """The model of a run, on this machine.

        Args:
            run_id: MLflow's.
            into: where a model that lies on a server is fetched to.

        Raises:
            TrackingError: no such run, it holds no full model, or the store cannot be asked.
        """
        with self._client() as client:
            run = _run(client, run_id)
            tags, search_of = run.data.tags, _search_of(client, run)
            rates = {float(each.data.params[RATE]) for each in search_of}
            metrics = run.data.metrics
            return BaselineRun(
                run_id=run_id,
                model=_stored_here(tags) or _fetched(client, run_id, into, tags),
                params=dict(run.data.params),
                costs={name: metrics[name] for name in COSTS if name in metrics},
                data_digest=tags.get("data.digest"),
                base_digest=tags.get("base.digest"),
                trials=len(search_of),
                rates=tuple(sorted(rates)),
                best_rate=_best_rate(search_of),
                seconds=sum(device_seconds(each.data.metrics) for each in search_of),
            )


def _run(client: MlflowClient, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"baseline.run_id={run_id}: this MLflow has no such run; is it the store that the run was "
            "recorded in (tracking.uri, MLFLOW_TRACKING_URI)?"
        ) from None
    if run.info.lifecycle_stage != "active":
        raise TrackingError(f"baseline.run_id={run_id}: that run was deleted; restore it first")
    return run


def _search_of(client: MlflowClient, run: Any) -> list[Any]:
    """The finished trials of the arm that a run of ours belongs to; none of any other run."""
    study, arm = run.data.tags.get(STUDY_TAG), run.data.tags.get("arm")
    if study is None or arm is None:
        return []
    query = f"tags.`{STUDY_TAG}` = '{study}' AND tags.arm = '{arm}' AND status = 'FINISHED'"
    trials = search(client, run.info.experiment_id, query)
    return [
        each for each in trials if "finalist" not in each.data.tags and RATE in each.data.params
    ]


def _best_rate(trials: list[Any]) -> float | None:
    """The learning rate of the trial that its own objective found best."""
    valued = []
    for trial in trials:
        params = trial.data.params
        name = params.get("objective.metric", "").replace("eval/", "best/eval_")
        if name in trial.data.metrics:
            sign = 1 if params.get("objective.direction") == "minimize" else -1
            valued.append((sign * trial.data.metrics[name], float(params[RATE])))
    return min(valued)[1] if valued else None


def _stored_here(tags: Mapping[str, str]) -> Path | None:
    """Full weights of our own trials stay in the trial's folder, which a tag names."""
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
    kept = f", nor is there {tags[FOLDER_TAG]}/model (deleted?)" if FOLDER_TAG in tags else ""
    raise TrackingError(
        f"baseline.run_id={run_id}: holds {'an adapter and ' if adapter else ''}no full model: no "
        f"folder with {CONFIG} and *{WEIGHTS} among its artifacts{kept}"
    )


def _folders(
    client: MlflowClient, run_id: str, path: str = "", depth: int = 0
) -> Iterator[tuple[str, set[str]]]:
    """Each folder of a run's artifacts with the names of its files, the outermost first."""
    found = client.list_artifacts(run_id, path or None)
    yield path, {PurePosixPath(item.path).name for item in found if not item.is_dir}
    if depth < MAX_DEPTH:
        for item in found:
            if item.is_dir:
                yield from _folders(client, run_id, item.path, depth + 1)
