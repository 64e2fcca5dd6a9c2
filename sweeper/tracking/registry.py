"""Read and change MLflow's model registry: the champion of a model and the champion before it.

A version refers to the adapter among its run's artifacts. Independent of the rules for promotion.
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
from sweeper.core.references import referenced, referenced_tree, resolved
from sweeper.tracking.shipment import STUDY_TAG, TRIAL_TAG, search_runs
from sweeper.tracking.store import TrackingStore
from sweeper.tracking.tracking_ledger import weights_of
from sweeper.tracking.tracking_server import local_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
PREVIOUS_TAG = "sweeper.previous"
FOLDER_TAG = "folder"
ROLLED_BACK_TAG = "sweeper.rolled_back"
"""Tag of a version that a user rolled back. No night promotes its trial again."""
NIGHTS = "nightly"
"""Name of the experiment with one run per night."""
GC_SECONDS = 3600.0
"""Time limit of the removal of deleted runs from a store."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model."""

    model: str
    number: str
    study: str
    trial: str
    """Key of the trial, such as lora/0007."""
    folder: Path
    """The trial's folder, which may not exist on this machine."""
    previous: str | None
    """Version number of the previous champion."""
    tags: Mapping[str, str]


class ModelRegistry(TrackingStore):
    """The registry of one tracking server or local store."""

    def champion(self, model: str) -> ModelVersion | None:
        """Return the version with the champion alias, or None.

        Raises:
            TrackingError: the registry does not respond.
        """
        with self._client() as client:
            number = _champion_number(client, model)
            return None if number is None else _version(client, model, number)

    def require_model(self, model: str) -> None:
        """Raise an error that names the registered models if this is none of them.

        Raises:
            TrackingError: there is no such model, or the registry does not respond.
        """
        with self._client() as client:
            names = sorted(each.name for each in _models(client))
        if model not in names:
            known = f"Registered: {', '.join(names)}" if names else "Nothing is registered yet"
            raise TrackingError(f"no model {model!r} is registered. {known}")

    def champions(self) -> list[ModelVersion]:
        """Return the champions of all models, and the versions that a rollback would restore.

        Raises:
            TrackingError: the registry does not respond.
        """
        with self._client() as client:
            numbers = [(each.name, each.aliases.get(ALIAS)) for each in _models(client)]
            now = [_version(client, name, str(number)) for name, number in numbers if number]
            before = [each for each in now if each.previous is not None]
            return [*now, *(_version(client, v.model, str(v.previous)) for v in before)]

    def versions(self, model: str) -> list[ModelVersion]:
        """Return all versions of a model.

        Raises:
            TrackingError: the registry does not respond.
        """
        with self._client() as client:
            found = client.search_model_versions(f"name = '{model}'")
            return [_version(client, model, str(each.version)) for each in found]

    def tag(self, version: ModelVersion, key: str, value: str) -> None:
        """Set a tag of a version.

        Raises:
            TrackingError: the registry does not respond.
        """
        with self._client() as client:
            client.set_model_version_tag(version.model, version.number, key, referenced(value))

    def collect_deleted(self, after_s: float, *, dry_run: bool) -> str | None:
        """Permanently remove runs that were deleted in MLflow, with their artifacts.

        Runs `mlflow gc` on a local SQLite store. For other stores return the command to run.

        Args:
            after_s: minimum seconds since a run's deletion.
            dry_run: True to remove nothing and return the command.

        Returns:
            A sentence about what was done or must be done, or None if no run is deleted.

        Raises:
            TrackingError: the store does not respond, or `mlflow gc` fails.
        """
        # `mlflow gc`, because MLflow's client cannot remove runs for good and its store's methods are
        # private. It ignores the registry, so any deleted run of a registered version blocks it
        uri = self._uri or local_uri(self._root.resolve())
        older = f"{after_s:.0f}s"
        with self._client() as client:
            deleted = _deleted_runs(client)
            if not deleted:
                return None
            models = [name for name, run in _registered_runs(client) if run in deleted]
            if models:
                return (
                    f"MLflow: none of {len(deleted)} deleted runs was removed permanently, because "
                    f"versions of {', '.join(sorted(set(models)))} refer to some of them. Restore those"
                )
            if dry_run or not uri.startswith("sqlite:"):
                command = f"mlflow gc --older-than {older} --backend-store-uri {redact(uri)}"
                how = "would be removed by" if dry_run else "can be removed on the server with"
                runs = f"of {len(deleted)} deleted runs, those older than {older}"
                return f"MLflow: {runs} {how}: {command}"
            _run_gc(uri, older)
            removed = len(deleted) - len(_deleted_runs(client))
            return f"MLflow: {removed} of {len(deleted)} deleted runs permanently removed"

    def promote(self, model: str, study: str, trial: str, tags: Mapping[str, str]) -> ModelVersion:
        """Register a trial's adapter as a new version and make it the champion.

        Args:
            model: name of the registered model, which is created if needed.
            study: study_name of the trial.
            trial: key of the trial, such as lora/0007.
            tags: the evidence for the promotion.

        Raises:
            TrackingError: the trial has no run or no adapter, or the registry does not respond.
            ArtifactError: the adapter differs from its manifest.
        """
        with self._client() as client:
            run = _run_of(client, study, trial)
            _require_adapter(client, run)
            if not client.search_registered_models(f"name = '{model}'"):
                client.create_registered_model(model)
            # Each version names the champion before it, so a rollback needs no other history
            before = _champion_number(client, model)
            origin = {STUDY_TAG: study, TRIAL_TAG: trial}
            origin[FOLDER_TAG] = run.data.tags.get(FOLDER_TAG, "")
            if before is not None:
                origin[PREVIOUS_TAG] = before
            made = client.create_model_version(
                model,
                source=f"{run.info.artifact_uri}/adapter",
                run_id=run.info.run_id,
                tags=referenced_tree({**tags, **origin}),
            )
            client.set_registered_model_alias(model, ALIAS, str(made.version))
            return _version(client, model, str(made.version))

    def rollback(self, model: str) -> ModelVersion:
        """Move the alias back to the previous champion.

        Raises:
            TrackingError: there is no previous champion, or the registry does not respond.
        """
        now = self.champion(model)
        if now is None:
            raise TrackingError(f"model {model!r} has no champion to roll back")
        if now.previous is None:
            raise TrackingError(
                f"version {now.number} of {model!r} is its first champion, so there is no previous one"
            )
        with self._client() as client:
            # Tagged first: if this process dies in between, no night promotes the version again
            client.set_model_version_tag(model, now.number, ROLLED_BACK_TAG, "true")
            client.set_registered_model_alias(model, ALIAS, now.previous)
            return _version(client, model, now.previous)

    def log_night(self, name: str, tags: Mapping[str, str], files: Sequence[Path]) -> None:
        """Record a night's digest as a run, or update the night's run.

        Raises:
            TrackingError: the server does not respond, or refuses.
        """
        with self._client() as client:
            found = client.get_experiment_by_name(NIGHTS)
            experiment = found.experiment_id if found else self._create_experiment(client)
            query = f"tags.`sweeper.night` = '{name}'"
            runs = client.search_runs([experiment], filter_string=query)
            run = runs[0] if runs else client.create_run(experiment, run_name=name)
            for key, value in referenced_tree({**tags, "sweeper.night": name}).items():
                client.set_tag(run.info.run_id, key, value)
            for path in files:
                client.log_artifact(run.info.run_id, str(path))
            client.set_terminated(run.info.run_id, "FINISHED")

    def _create_experiment(self, client: MlflowClient) -> str:
        # MLflow's default depends on the first process's current folder
        local = (self._root / "artifacts" / NIGHTS).resolve().as_uri()
        location = local if self._uri is None else None
        return str(client.create_experiment(NIGHTS, artifact_location=location))


def _deleted_runs(client: MlflowClient) -> set[str]:
    from mlflow.entities import ViewType

    experiments = [each.experiment_id for each in client.search_experiments(ViewType.ALL)]
    found: set[str] = set()
    for experiment in experiments:
        runs = search_runs(client, experiment, "", ViewType.DELETED_ONLY)
        found |= {run.info.run_id for run in runs}
    return found


def _registered_runs(client: MlflowClient) -> Iterator[tuple[str, str]]:
    """Yield model name and run id of every registered version."""
    for model in _models(client):
        for version in client.search_model_versions(f"name = '{model.name}'"):
            yield model.name, str(version.run_id)


def _run_gc(uri: str, older: str) -> None:
    command = [sys.executable, "-m", "mlflow", "gc", "--older-than", older]
    stores = ["--backend-store-uri", uri, "--tracking-uri", uri]
    try:
        done = subprocess.run(
            [*command, *stores], capture_output=True, text=True, check=False, timeout=GC_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TrackingError(f"mlflow gc did not end within {GC_SECONDS / 60:g} min") from None
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
    # A search, because get_registered_model raises for a name that is not registered
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
        folder=_folder(f"version {number} of {model!r}", tags),
        previous=tags.get(PREVIOUS_TAG),
        tags=dict(tags),
    )


def _folder(whose: str, tags: Mapping[str, str]) -> Path:
    """Return the folder that a run or a version names as its trial's.

    Raises:
        TrackingError: no folder can have this name, so its weights cannot be found.
    """
    name = resolved(tags.get(FOLDER_TAG, ""))
    if "\0" in name:
        raise TrackingError(f"{whose}: its tag {FOLDER_TAG!r} is {name!r}, which names no folder")
    return Path(name)


def _require_adapter(client: MlflowClient, run: Any) -> None:
    """Make sure that a run has its whole adapter, by uploading it from the trial's folder if needed.

    Raises:
        TrackingError: neither the run nor the trial's folder has the adapter.
    """
    # The manifest is uploaded last, so a run that has the manifest has all files
    stored = {item.path for item in client.list_artifacts(run.info.run_id, "adapter")}
    if f"adapter/{MANIFEST}" in stored:
        return
    folder = TrialFolder(_folder(f"run {run.info.run_name}", run.data.tags))
    if not folder.adapter.is_dir():
        raise TrackingError(
            f"neither run {run.info.run_name} nor {folder.path} contains the adapter. Its weights were "
            "removed at the end of its study (hydra.sweeper.retention.adapters=null keeps all)"
        )
    verify_manifest(folder.adapter)
    for path in weights_of(folder):
        subfolder = path.parent.relative_to(folder.path).as_posix()
        client.log_artifact(run.info.run_id, str(path), None if subfolder == "." else subfolder)


def _run_of(client: MlflowClient, study: str, trial: str) -> Any:
    query = f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{TRIAL_TAG}` = '{trial}'"
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, filter_string=query)
    if not runs:
        raise TrackingError(
            f"MLflow has no run of trial {trial} of study {study!r}. Set MLFLOW_TRACKING_URI to the "
            "store that the study was recorded in"
        )
    return runs[0]
