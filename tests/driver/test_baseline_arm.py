"""baseline.run_id in whole sessions with a fake trainer and a real MLflow store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeper.commands.run_study import run_study
from sweeper.config.compose import parse_command_line
from sweeper.core.errors import ConfigError, StudyMismatch, TrackingError
from sweeper.reporting.result_tables import conditions
from sweeper.reporting.results import StudyResults, load_results
from sweeper.reporting.verdict import judge
from sweeper.search.study_plan import StudyPlan, studies
from sweeper.tracking.tracking_server import local_uri

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "pruner=none"),
    *("workers.fake.step_seconds=0.0", "hydra.sweeper.n_trials=4", "hydra.sweeper.priors=[]"),
)


def _plans(*overrides: str) -> list[StudyPlan]:
    """As typed: baseline.run_id needs no hydra.sweeper. in front."""
    return studies(parse_command_line([*FAKE, *overrides]).overrides)


def _run(*overrides: str) -> StudyResults:
    (plan,) = _plans(*overrides)
    return run_study(plan)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The MLflow run of the best full fine-tune of an ended study, in a user's folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("user"))
        best = _run("hydra.sweeper.study_name=old").arms[1].best
        assert best is not None
        model = Path(f"outputs/old/full/trial_{best.number:04d}/model")
        model.mkdir()
        (model / "config.json").write_text("{}")
        client = MlflowClient(local_uri(Path("mlruns").resolve()))
        experiment = client.get_experiment_by_name("lr_rank_sweep")
        query = f"tags.`sweeper.trial` = 'full/{best.number:04d}'"
        (run,) = client.search_runs([experiment.experiment_id], filter_string=query)
        yield str(run.info.run_id)


def test_an_adopted_arm_trains_nothing_and_says_so(
    earlier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One judgement and no seeds for it; words, conditions and file name the run and its search."""
    results = _run("hydra.sweeper.study_name=new", f"baseline.run_id={earlier}")
    assert "judged and not trained" in capsys.readouterr().out
    lora, full = results.arms
    assert (lora.name, full.name, full.finished) == ("lora", "full", 1)
    assert full.trials[0].outcome.steps == 0
    assert not list(Path("outputs/new/full/finalists").glob("trial_*"))
    assert len(results.contrasts) == len(results.forgetting[1:]) == 1
    words = judge(results).words
    assert f"it is MLflow run {earlier}, evaluated on this study's rows." in words
    assert "Its search has 8 finished trials." in words
    assert "was trained with" not in words
    assert "does not record" not in words
    row = conditions(results).rows[1]
    assert row[:3] == (f"full fine-tuning (run {earlier[:8]})", "8 in that run's search", "1")
    stored = load_results("new", Path("outputs"))
    assert stored.arms[1].adopted == full.adopted
    assert full.adopted is not None
    assert full.adopted.data_digest == full.facts.data_digest


def test_the_same_command_needs_no_mlflow_run_any_more(
    earlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged once, it is read back; another run under the same name is another question."""

    def gone(*_: object) -> None:
        raise AssertionError("nobody asks MLflow for a run that was judged")

    command = ("hydra.sweeper.study_name=new", f"baseline.run_id={earlier}")
    first = _run(*command)
    with monkeypatch.context() as patch:
        patch.setattr("sweeper.tracking.baseline_runs.BaselineStore.find", gone)
        again = _run(*command)
    assert again.contrasts == first.contrasts
    with pytest.raises(StudyMismatch):
        _run("hydra.sweeper.study_name=new")


def test_what_is_not_known_of_a_run_makes_the_verdict_provisional(earlier: str) -> None:
    """Other data than it was trained on: the reason, and the command that trains one's own."""
    other = ("hydra.sweeper.study_name=other", "data.split_seed=7", "data.train=elsewhere.jsonl")
    verdict = judge(_run(*other, f"baseline.run_id={earlier}"))
    assert verdict.words.startswith("PROVISIONAL: ")
    assert "was trained on other data or splits, so it may have seen" in verdict.words
    assert "hydra.sweeper.study_name=other_own_baseline" in verdict.text
    assert "hydra.sweeper.baseline.run_id=null" in verdict.text


def test_another_training_of_the_same_data_makes_the_verdict_provisional(earlier: str) -> None:
    """Another loss mask and half the steps: both are named, and the tables keep the run's own."""
    other = ("data.train_on=everything", "training.max_steps=32", "hydra.sweeper.n_trials=2")
    results = _run("hydra.sweeper.study_name=mask", *other, f"baseline.run_id={earlier}")
    verdict = judge(results)
    assert verdict.words.startswith("PROVISIONAL: ")
    assert (
        "was trained with data.train_on=completions, not data.train_on=everything" in verdict.words
    )
    assert "was trained with training.max_steps=64, not training.max_steps=32" in verdict.words
    assert "was trained on other data" not in verdict.words
    assert results.arms[1].setting("training.max_steps") == 64
    assert judge(load_results("mask", Path("outputs"))) == verdict


@pytest.mark.slow
def test_it_is_a_way_out_where_full_fine_tuning_does_not_fit(
    earlier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way is printed where the arm is left out; with it the arm is there, without any training."""
    small = ("workers.fake.free_mib=10", "hydra.sweeper.n_trials=2")
    assert len(_run("hydra.sweeper.study_name=small", *small).arms) == 1
    assert "baseline.run_id=MLFLOW_RUN_ID" in capsys.readouterr().out
    adopted = _run("hydra.sweeper.study_name=small2", *small, f"baseline.run_id={earlier}")
    assert [arm.name for arm in adopted.arms] == ["lora", "full"]


def test_an_experiment_without_a_full_arm_gets_one(earlier: str) -> None:
    """Its overrides are adapter=none and quantization=none."""
    overrides = ("hydra.sweeper.study_name=alone", "~hydra.sweeper.arms.full")
    (plan,) = _plans(*overrides, f"baseline.run_id={earlier}")
    assert [(arm.name, arm.run_id, arm.n_trials) for arm in plan.arms] == [
        ("lora", None, 4),
        ("full", earlier, 1),
    ]
    assert plan.arms[1].settings.adapter.method == "none"


@pytest.mark.usefixtures("earlier")
def test_a_wrong_run_is_found_before_anything_is_trained() -> None:
    """No such run; and without MLflow, or on a Pareto front, the setting itself is refused."""
    shutil.rmtree("outputs/wrong", ignore_errors=True)
    with pytest.raises(TrackingError, match="no such run"):
        _run("hydra.sweeper.study_name=wrong", "baseline.run_id=0123abcd")
    assert not list(Path("outputs/wrong").glob("*/trial_*"))
    with pytest.raises(ConfigError, match="tracking=none leaves no MLflow"):
        _plans("baseline.run_id=abc", "tracking=none")
    with pytest.raises(ConfigError, match="what an adopted run cost is not measured here"):
        _plans("baseline.run_id=abc", "hydra.sweeper.costs=[parameters/trainable]")
