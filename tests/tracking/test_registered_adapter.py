"""What MLflow hands out is what was trained: a registered adapter, downloaded and judged again."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from peft import PeftModel

from sweeper.commands.run_study import run_study
from sweeper.config.compose import read_yaml
from sweeper.config.settings import TrialSettings, validate
from sweeper.core.paths import StudyFolder
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.modeling.base_model import load_base
from sweeper.search.study_plan import studies
from sweeper.tracking.registry import ModelRegistry
from sweeper.tracking.tracking_server import local_uri
from sweeper.training.prepared_data import prepare

pytestmark = pytest.mark.slow  # a real study of three trials


@pytest.fixture(scope="module")
def swept(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three QLoRA trials whose best adapter is registered as `tiny`."""
    from tests.commands.test_reproduce import write_rows

    folder = tmp_path_factory.mktemp("user")
    write_rows(folder / "my.jsonl", "sum")
    overrides = [
        *("+experiment=lr_rank_sweep", f"model.base_model={tiny_base}", "data.train=my.jsonl"),
        *("training=tiny", "space=tiny", "evaluation=tiny", "finalists=none", "workers=inline"),
        *("training.max_steps=4", "training.eval_steps=2", "hydra.sweeper.n_trials=3"),
        *("~hydra.sweeper.arms.full", "pruner=none", "hydra.sweeper.retention.adapters=2"),
        "hydra.sweeper.study_name=lr_rank_sweep",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (plan,) = studies(overrides)
        best = run_study(plan).arms[0].best
        assert best is not None
        registry = ModelRegistry(None, Path("mlruns"))
        registry.promote("tiny", "lr_rank_sweep", f"lora/{best.number:04d}", {})
    return folder


def test_registered_adapter_has_the_recorded_loss(swept: Path, tmp_path: Path) -> None:
    """Downloaded by name and version through MLflow's client, on a fresh base: the run's loss."""
    client = MlflowClient(local_uri(swept / "mlruns"))
    (version,) = client.search_model_versions("name = 'tiny'")
    run = client.get_run(version.run_id)
    source = client.get_model_version_download_uri("tiny", version.version)
    adapter = mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path))
    config = client.download_artifacts(version.run_id, "config.yaml", str(tmp_path))
    settings = validate(TrialSettings, read_yaml(Path(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(swept)
        base = load_base(settings.model, settings.quantization, trained=False)
        data = prepare(settings.data, base)
    model = PeftModel.from_pretrained(base.model, adapter)
    found = data.judge(settings, base)(model, JudgementReader.RESULT).value("eval/loss")
    assert found == pytest.approx(run.data.metrics["best/eval_loss"], abs=1e-5)
    plain = data.judge(settings, base)(model.unload(), JudgementReader.RESULT)
    assert plain.value("eval/loss") > found + 0.01


def test_the_best_two_are_models_of_the_experiment(swept: Path) -> None:
    """As many as asked for, each with its run's figure."""
    client = MlflowClient(local_uri(swept / "mlruns"))
    experiment = client.get_experiment_by_name("lr_rank_sweep").experiment_id
    models = client.search_logged_models([experiment])
    runs = {run.info.run_id: run for run in client.search_runs([experiment])}
    trials = [run for run in runs.values() if "sweeper.trial" in run.data.tags]
    losses = sorted(run.data.metrics["best/eval_loss"] for run in trials)
    shown = []
    for model in models:
        (loss,) = [each.value for each in model.metrics if each.key == "best/eval_loss"]
        assert loss == runs[model.source_run_id].data.metrics["best/eval_loss"]
        shown.append(loss)
    assert sorted(shown) == losses[:2]


def test_the_parent_holds_report_pictures_and_the_best(swept: Path) -> None:
    """Report in all forms and every figure as artifacts; the best child's parameters and metrics."""
    client = MlflowClient(local_uri(swept / "mlruns"))
    experiment = client.get_experiment_by_name("lr_rank_sweep").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "sweeper.trial" not in run.data.tags]
    best = next(
        run for run in runs if run.data.tags.get("sweeper.trial") == parent.data.tags["best.trial"]
    )
    key = "training.learning_rate"
    assert parent.data.tags[f"best.{key}"] == best.data.params[key]
    assert parent.data.metrics["best/eval_loss"] == best.data.metrics["best/eval_loss"]
    assert parent.data.tags["mlflow.note.content"].startswith("# lr_rank_sweep\n")
    paths = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert paths == {"results.json", "report.md", "report.html", "figures"}
    figures = {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    assert "figures/learning_rate_against_loss.svg" in figures
    local = StudyFolder(swept / "outputs" / "lr_rank_sweep").figures
    assert {f"figures/{path.name}" for path in local.iterdir()} == figures
