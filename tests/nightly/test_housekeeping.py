"""After a night: weights by policy, MLflow's deleted runs, and nothing where nobody is sure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeper.commands.retention import Removal
from sweeper.core.errors import TrackingError
from sweeper.nightly import housekeeping
from sweeper.nightly.housekeeping import tidy
from sweeper.nightly.nightly_set import RetentionPolicy
from sweeper.tracking.registry import ModelRegistry
from sweeper.tracking.tracking_server import local_uri


def _policy(**values: object) -> RetentionPolicy:
    defaults = {"keep_adapters": 1, "mlflow_deleted_after": None, "dry_run": False}
    return RetentionPolicy.model_validate({**defaults, **values})


@pytest.fixture
def loser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the policy of every study would delete."""
    loser = tmp_path / "outputs" / "night" / "adapter"
    loser.mkdir(parents=True)
    found = [Removal(loser, 12.34, "adapter of a loser")]
    monkeypatch.setattr(housekeeping, "removals", lambda *_: found)
    return loser


def test_a_dry_run_tells_and_deletes_nothing(loser: Path, tmp_path: Path) -> None:
    """The line says what would go; without dry_run it goes; without keep_adapters nobody looks."""
    outputs = tmp_path / "outputs"
    assert tidy(_policy(dry_run=True), ["night"], outputs, []) == [
        "night: 12.3 MiB would be freed (1 × adapter of a loser)"
    ]
    assert tidy(_policy(keep_adapters=None), ["night"], outputs, []) == []
    assert loser.exists()
    assert tidy(_policy(), ["night"], outputs, []) == [
        "night: 12.3 MiB freed (1 × adapter of a loser)"
    ]
    assert not loser.exists()


def test_nothing_is_deleted_while_champions_are_unknown(
    loser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is away: the champion's weights might be among those that would go."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = ModelRegistry("http://127.0.0.1:9", tmp_path)
    with pytest.raises(TrackingError):
        tidy(_policy(), ["night"], tmp_path / "outputs", [registry])
    assert loser.exists()


def test_runs_deleted_in_mlflow_go_for_good(tmp_path: Path, empty_store: Path) -> None:
    """A dry run names the command; a registered version's run holds all back; then MLflow collects."""
    shutil.copy(empty_store, tmp_path)
    registry, client = ModelRegistry(None, tmp_path), MlflowClient(local_uri(tmp_path))
    experiment = client.create_experiment("mine", (tmp_path / "artifacts").as_uri())
    kept, deleted = (client.create_run(experiment).info.run_id for _ in range(2))
    assert registry.collect_deleted(0.0, dry_run=False) is None
    client.log_text(deleted, "weights", "adapter/adapter_model.safetensors")
    client.delete_run(deleted)
    words = registry.collect_deleted(0.0, dry_run=True)
    assert words is not None
    assert (
        "of 1 deleted runs, those older than 0s would be removed by: mlflow gc --older-than 0s"
        in words
    )
    client.create_registered_model("model")
    version = client.create_model_version("model", "nowhere", deleted)
    held = registry.collect_deleted(0.0, dry_run=False)
    assert held == (
        "MLflow: none of 1 deleted runs was removed permanently, because versions of model refer to "
        "some of them. Restore those"
    )
    client.delete_model_version("model", version.version)
    done = registry.collect_deleted(0.0, dry_run=False)
    assert done == "MLflow: 1 of 1 deleted runs permanently removed"
    assert client.get_run(kept).info.run_id == kept
    assert not list((tmp_path / "artifacts").rglob("*.safetensors"))
    assert registry.collect_deleted(0.0, dry_run=False) is None
