"""MLflow's model registry: which version of a model is the champion, and which one was before.

A version points at the adapter that its trial's run holds. Knows nothing of why a champion moves.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper.core.errors import TrackingError
from sweeper.core.manifest import MANIFEST, verify_manifest
from sweeper.core.paths import TrialFolder
from sweeper.core.redaction import redact
from sweeper.tracking.shipment import STUDY_TAG, TRIAL_TAG, search
from sweeper.tracking.store import TrackingStore
from sweeper.tracking.tracking_ledger import weights_of
from sweeper.tracking.tracking_server import local_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
PREVIOUS_TAG = "sweeper.previous"
FOLDER_TAG = "folder"
ROLLED_BACK_TAG = "sweeper.rolled_back"
"""Of a version that a person took back: no night promotes its trial again."""
NIGHTS = "nightly"
"""Experiment that holds a run per night."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model."""

    model: str
    number: str
    study: str
    trial: str
    """"lora/0007"."""
    folder: Path
    """The trial's folder, where this machine has it."""
    previous: str | None
    """The champion before it."""
    tags: Mapping[str, str]


class ModelRegistry(TrackingStore):
    """The registry of one tracking server or local store."""

    def champion(self, model: str) -> ModelVersion | None:
        """The version with the alias, if the model is registered and has one.

        Raises:
            TrackingError: the registry cannot be asked.
        """
        with self._client() as client:
            number = _champion_number(client, model)
            return None if number is None else _version(client, model, number)

    def champions(self) -> list[ModelVersion]:
        """The champions of all models, and the ones a rollback would bring back.

        Raises:
            TrackingError: the registry cannot be asked.
        """
        with self._client() as client:
            numbers = [(each.name, each.aliases.get(ALIAS)) for each in _models(client)]
            now = [_version(client, name, str(number)) for name, number in numbers if number]
            before = [each for each in now if each.previous is not None]
            return [*now, *(_version(client, v.model, str(v.previous)) for v in before)]

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model.

        Raises:
            TrackingError: the registry cannot be asked.
        """
        with self._client() as client:
            found = client.search_model_versions(f"name = '{model}'")
            return [_version(client, model, str(each.version)) for each in found]

    def tag(self, version: ModelVersion, key: str, value: str) -> None:
        """Write a fact about a version where people and programs find it.

        Raises:
            TrackingError: the registry cannot be asked.
        """
        with self._client() as client:
            client.set_model_version_tag(version.model, version.number, key, value)

    def collect_deleted(self, after_s: float, *, dry_run: bool) -> str | None:
        """Remove runs that were deleted in MLflow so long ago for good, with their artifacts.

        Only of a local SQLite store, by MLflow's own `mlflow gc`; for a server it is told what to run
        there. A deleted run that a registered version points at keeps all of them.

        Returns:
            What was or is to be done; None if no run is deleted.

        Raises:
            TrackingError: the store cannot be asked, or `mlflow gc` fails.
        """
        uri = self._uri or local_uri(self._root.resolve())
        older = f"{after_s:.0f}s"
        with self._client() as client:
            before = _deleted_runs(client)
            if not before:
                return None
            held = [name for name, run in _registered_runs(client) if run in before]
            if held:
                return (
                    f"MLflow: none of {len(before)} deleted runs is removed for good: versions of "
                    f"{', '.join(sorted(set(held)))} point at some; restore those"
                )
            if dry_run or not uri.startswith("sqlite:"):
                command = f"mlflow gc --older-than {older} --backend-store-uri {redact(uri)}"
                where = "would be removed by" if dry_run else "are removed on its server by"
                return f"MLflow: of {len(before)} deleted runs those older {where}: {command}"
            _collect(uri, older)
            gone = len(before) - len(_deleted_runs(client))
            return f"MLflow: {gone} of {len(before)} deleted runs removed for good"

    def promote(self, model: str, study: str, trial: str, tags: Mapping[str, str]) -> ModelVersion:
        """Register a trial's adapter as a new version and make it the champion.

        Args:
            model: name of the registered model; made if it is new.
            study: study_name.
            trial: "lora/0007".
            tags: the evidence, for people.

        Raises:
            TrackingError: no such run, it has no adapter, or the registry cannot be asked.
            ArtifactError: the adapter is not what its manifest says.
        """
        with self._client() as client:
            run = _run_of(client, study, trial)
            _require_adapter(client, run)
            if not client.search_registered_models(f"name = '{model}'"):
                client.create_registered_model(model)
            before = _champion_number(client, model)
            origin = {STUDY_TAG: study, TRIAL_TAG: trial}
            origin[FOLDER_TAG] = run.data.tags.get(FOLDER_TAG, "")
            if before is not None:
                origin[PREVIOUS_TAG] = before
            made = client.create_model_version(
                model,
                source=f"{run.info.artifact_uri}/adapter",
                run_id=run.info.run_id,
                tags={**tags, **origin},
            )
            client.set_registered_model_alias(model, ALIAS, str(made.version))
            return _version(client, model, str(made.version))

    def rollback(self, model: str) -> ModelVersion:
        """Give the alias back to the champion before.

        Raises:
            TrackingError: there is none, or the registry cannot be asked.
        """
        now = self.champion(model)
        if now is None:
            raise TrackingError(f"model {model!r} has no champion that could be rolled back")
        if now.previous is None:
            raise TrackingError(
                f"version {now.number} of {model!r} is its first champion; there is none before it"
            )
        with self._client() as client:
            client.set_model_version_tag(model, now.number, ROLLED_BACK_TAG, "true")
            client.set_registered_model_alias(model, ALIAS, now.previous)
            return _version(client, model, now.previous)

    def log_night(self, name: str, tags: Mapping[str, str], files: Sequence[Path]) -> None:
        """Record a night's digest as a run of its own, or add to the one it has.

        Raises:
            TrackingError: the server cannot be asked, or refuses.
        """
        with self._client() as client:
            found = client.get_experiment_by_name(NIGHTS)
            experiment = found.experiment_id if found else self._create_experiment(client)
            query = f"tags.`sweeper.night` = '{name}'"
            runs = client.search_runs([experiment], filter_string=query)
            run = runs[0] if runs else client.create_run(experiment, run_name=name)
            for key, value in {**tags, "sweeper.night": name}.items():
                client.set_tag(run.info.run_id, key, value)
            for path in files:
                client.log_artifact(run.info.run_id, str(path))
            client.set_terminated(run.info.run_id, "FINISHED")

    def _create_experiment(self, client: MlflowClient) -> str:
        local = (self._root / "artifacts" / NIGHTS).resolve().as_uri()
        location = local if self._uri is None else None
        return str(client.create_experiment(NIGHTS, artifact_location=location))


def _deleted_runs(client: MlflowClient) -> set[str]:
    from mlflow.entities import ViewType

    experiments = [each.experiment_id for each in client.search_experiments(ViewType.ALL)]
    found: set[str] = set()
    for experiment in experiments:
        runs = search(client, experiment, "", ViewType.DELETED_ONLY)
        found |= {run.info.run_id for run in runs}
    return found


def _registered_runs(client: MlflowClient) -> Iterator[tuple[str, str]]:
    """Each version's model, and the run it points at."""
    for model in _models(client):
        for version in client.search_model_versions(f"name = '{model.name}'"):
            yield model.name, str(version.run_id)


def _collect(uri: str, older: str) -> None:
    command = [sys.executable, "-m", "mlflow", "gc", "--older-than", older]
    stores = ["--backend-store-uri", uri, "--tracking-uri", uri]
    done = subprocess.run([*command, *stores], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrackingError(f"mlflow gc failed: {redact(last)}")


def _models(client: MlflowClient) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _champion_number(client: MlflowClient, model: str) -> str | None:
    found = client.search_registered_models(f"name = '{model}'")
    number = found[0].aliases.get(ALIAS) if found else None
    return None if number is None else str(number)


def _version(client: MlflowClient, model: str, number: str) -> ModelVersion:
    tags = client.get_model_version(model, number).tags
    return ModelVersion(
        model=model,
        number=number,
        study=tags.get(STUDY_TAG, ""),
        trial=tags.get(TRIAL_TAG, ""),
        folder=Path(tags.get(FOLDER_TAG, "")),
        previous=tags.get(PREVIOUS_TAG),
        tags=dict(tags),
    )


def _require_adapter(client: MlflowClient, run: Any) -> None:
    """A run holds its adapter, all of it, if it was kept; one that was not is uploaded now.

    Raises:
        TrackingError: its weights are nowhere.
    """
    stored = {item.path for item in client.list_artifacts(run.info.run_id, "adapter")}
    if f"adapter/{MANIFEST}" in stored:
        return
    folder = TrialFolder(Path(run.data.tags.get(FOLDER_TAG, "")))
    if not folder.adapter.is_dir():
        raise TrackingError(
            f"run {run.info.run_name} holds no adapter, nor does {folder.path}: its weights went "
            "when its study ended (hydra.sweeper.retention.adapters=null keeps all)"
        )
    verify_manifest(folder.adapter)
    for path in weights_of(folder):
        place = path.parent.relative_to(folder.path).as_posix()
        client.log_artifact(run.info.run_id, str(path), None if place == "." else place)


def _run_of(client: MlflowClient, study: str, trial: str) -> Any:
    query = f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{TRIAL_TAG}` = '{trial}'"
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, filter_string=query)
    if not runs:
        raise TrackingError(
            f"MLflow has no run of trial {trial} of study {study!r}; is it the store that the study "
            "was recorded in (MLFLOW_TRACKING_URI)?"
        )
    return runs[0]
