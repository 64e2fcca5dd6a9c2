"""Earlier full fine-tunes in a real MLflow store: what is found and known of them, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeper.core.errors import TrackingError
from sweeper.tracking.baseline_runs import BaselineStore
from sweeper.tracking.tracking_server import local_uri


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A store of this module's own, with one experiment."""
    root = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, root)
    MlflowClient(local_uri(root)).create_experiment("mine", (root / "artifacts").as_uri())
    return root


def _run(root: Path, tags: Mapping[str, str], loss: float | None = None, **params: object) -> str:
    client = MlflowClient(local_uri(root))
    experiment = client.get_experiment_by_name("mine")
    run = client.create_run(experiment.experiment_id, tags=dict(tags))
    for name, value in params.items():
        client.log_param(run.info.run_id, name.replace("__", "."), value)
    client.log_param(run.info.run_id, "objective.metric", "eval/loss")
    client.log_param(run.info.run_id, "objective.direction", "minimize")
    if loss is not None:
        client.log_metric(run.info.run_id, "best/eval_loss", loss)
        client.log_metric(run.info.run_id, "cost/seconds", 10.0)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_trial_of_ours_brings_its_search(root: Path, tmp_path: Path) -> None:
    """Weights from the folder that its tag names; rates, best rate and time of its arm's trials."""
    _model(tmp_path / "full" / "trial_0001" / "model")
    common = {"sweeper.study": "s", "arm": "full", "data.digest": "d", "base.digest": "b"}
    runs = [
        _run(
            *(root, {**common, "folder": str(tmp_path / "full" / f"trial_{number:04d}")}, loss),
            training__learning_rate=rate,
        )
        for number, (rate, loss) in enumerate([(1e-5, 4.2), (1e-4, 4.0), (1e-3, 4.1)])
    ]
    _run(root, {**common, "finalist": "full/0001"}, 3.0, training__learning_rate=5e-4)
    _run(root, {**common, "arm": "lora"}, 3.0, training__learning_rate=5e-2)
    found = BaselineStore(None, root).find(runs[1], tmp_path / "into")
    assert found.model == (tmp_path / "full" / "trial_0001" / "model").resolve()
    assert (found.data_digest, found.base_digest) == ("d", "b")
    assert (found.trials, found.rates, found.best_rate) == (3, (1e-5, 1e-4, 1e-3), 1e-4)
    assert (found.seconds, found.costs) == (30.0, {"cost/seconds": 10.0})
    assert found.params["training.learning_rate"] == "0.0001"
    assert not (tmp_path / "into").exists()


def test_a_model_among_the_artifacts_is_fetched(root: Path, tmp_path: Path) -> None:
    """Somebody else's run: the first folder in transformers' layout; nothing is known of a search."""
    run = _run(root, {})
    client = MlflowClient(local_uri(root))
    client.log_artifacts(run, str(_model(tmp_path / "model")), "output/checkpoint")
    found = BaselineStore(None, root).find(run, tmp_path / "into")
    assert found.model.is_relative_to((tmp_path / "into").resolve())
    assert {path.name for path in found.model.iterdir()} == {"config.json", "model.safetensors"}
    assert (found.trials, found.rates, found.best_rate, found.data_digest) == (0, (), None, None)


def test_what_is_no_baseline_is_refused(root: Path, tmp_path: Path) -> None:
    """No such run, a deleted one, one with an adapter alone, one whose trial's weights are gone."""
    find = BaselineStore(None, root).find
    with pytest.raises(
        TrackingError, match=r"baseline\.run_id=abc: this MLflow store has no such run"
    ):
        find("abc", tmp_path)
    client = MlflowClient(local_uri(root))
    deleted = _run(root, {})
    client.delete_run(deleted)
    with pytest.raises(TrackingError, match="was deleted"):
        find(deleted, tmp_path)
    adapter = _run(root, {})
    client.log_text(adapter, "{}", "adapter/adapter_config.json")
    with pytest.raises(TrackingError, match="has an adapter but no full model"):
        find(adapter, tmp_path)
    gone = _run(root, {"folder": "outputs/s/full/trial_0000"})
    with pytest.raises(TrackingError, match=r"and outputs/s/full/trial_0000/model is missing"):
        find(gone, tmp_path)
