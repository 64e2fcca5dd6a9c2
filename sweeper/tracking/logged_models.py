"""Adapters as MLflow's LoggedModels, and versions of a registered model: files only, no model is loaded.

Every call may be repeated: what is there already is found by its tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweeper.tracking.tracker import ModelRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

STUDY_TAG, TRIAL_TAG = "sweeper.study", "sweeper.trial"
MODEL_TYPE = "PEFT adapter"
SHOWN = ("best/", "parameters/trainable")
"""Metrics of the run that the model's own page shows: what it is worth, and its size."""


def log_models(
    client: MlflowClient,
    experiment: str,
    study: str,
    models: Sequence[ModelRecord],
    runs: Mapping[str, str],
) -> list[str]:
    """Log adapters as outputs of their trials' runs; their ids.

    Args:
        client: of the store.
        experiment: its id there.
        study: study_name.
        models: of the study's trials.
        runs: run ids by trial.
    """
    return [_log_model(client, experiment, study, model, runs[model.trial]) for model in models]


def register(
    client: MlflowClient, name: str, study: str, trial: str, model_id: str, run: str
) -> None:
    """Make a logged model the newest version of a registered one, unless it is a version already."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    if any(version.run_id == run for version in versions):
        return
    source = client.get_logged_model(model_id).artifact_location
    tags = {STUDY_TAG: study, TRIAL_TAG: trial}
    # by its location: MLflow looks a models:/ URI up in its global store, whatever the client's is
    client.create_model_version(name, source=source, run_id=run, model_id=model_id, tags=tags)


def _log_model(
    client: MlflowClient, experiment: str, study: str, model: ModelRecord, run: str
) -> str:
    from mlflow.entities import LoggedModelOutput

    for earlier in _logged(client, experiment, study, model.trial):
        if str(earlier.status) == "READY":
            return str(earlier.model_id)
        client.delete_logged_model(
            earlier.model_id
        )  # its driver was killed while it sent the files
    made = client.create_logged_model(
        experiment,
        name=f"{study}-{model.trial.replace('/', '-')}",
        source_run_id=run,
        tags={STUDY_TAG: study, TRIAL_TAG: model.trial},
        params={name: str(value) for name, value in model.params.items()},
        model_type=MODEL_TYPE,
    )
    client.log_model_artifacts(made.model_id, str(model.adapter))
    client.log_outputs(run, [LoggedModelOutput(made.model_id, model.step)])
    _show_metrics(client, run, made.model_id)
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def _logged(client: MlflowClient, experiment: str, study: str, trial: str) -> list[Any]:
    query = f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{TRIAL_TAG}` = '{trial}'"
    return list(client.search_logged_models([experiment], filter_string=query))


def _show_metrics(client: MlflowClient, run: str, model_id: str) -> None:
    """The run's own points once more, as the model's: the store keeps each of them once."""
    from mlflow.entities import Metric

    names = [name for name in client.get_run(run).data.metrics if name.startswith(SHOWN)]
    points = [
        Metric(point.key, point.value, point.timestamp, point.step, model_id=model_id)
        for name in names
        for point in client.get_metric_history(run, name)[-1:]
    ]
    client.log_batch(run, metrics=points)
