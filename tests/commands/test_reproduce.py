"""A recorded trial trained again: the same figure, or what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from sweeper.cli.verbs import app
from sweeper.commands.reproduce import (
    EXACT,
    ROUNDING,
    RecordedTrial,
    allowance,
    differing,
    find_record,
)
from sweeper.commands.run_trial import run_single
from sweeper.core.errors import ConfigError, StudyError, TrackingError
from sweeper.core.outcome import ArmBaseline, Outcome
from sweeper.core.paths import StudyFolder, TrialFolder, read_json, write_json
from sweeper.tracking.provenance import origin, provenance
from sweeper.tracking.store import TrackingStore
from sweeper.tracking.tracking_server import local_uri
from tests.conftest import make_settings
from tests.reporting.studies import FACTS

HERE = ("workers=inline", "tracking=none")
CPU = FACTS.model_copy(update={"device": "cpu, 2 threads"})


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A user's folder, with a store of its own."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mlruns").mkdir()
    shutil.copy(empty_store, folder / "mlruns")
    return folder


@pytest.fixture(scope="module")
def trained(tiny_base: Path, user: Path) -> TrialFolder:
    """A trial of a few steps on forty rows of my.jsonl, recorded in the folder's MLflow store."""
    write_rows(user / "my.jsonl", "sum")
    folder = TrialFolder(user / "outputs" / "mine" / "lora" / "trial_0003")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(user)
        settings = make_settings(
            *(f"model.base_model={tiny_base}", "data.train=my.jsonl", "quantization=none"),
            *("training.max_steps=4", "training.eval_steps=2", "training.logging_steps=1"),
            *("training.learning_rate=0.01", "workers=inline", "tracking=mlflow"),
        )
        run_single(settings, folder, "")
    return folder


def write_rows(path: Path, word: str) -> None:
    """Forty Alpaca rows about the `word` of two numbers."""
    rows = [
        {
            "instruction": "Write a one-line docstring.",
            "input": f"def add_{number}(a, b)",
            "output": f"Return the {word} of a and b plus {number}.",
        }
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ask(*arguments: str) -> tuple[int, dict[str, Any]]:
    """`sweeper reproduce … --json`: exit code and answer."""
    result = CliRunner().invoke(app, ["reproduce", *arguments, *HERE, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def test_a_trial_is_reproduced(
    trained: TrialFolder, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figure to the last bits, by a new training whose folder stays; exit code 0."""
    monkeypatch.chdir(user)
    code, found = ask("mine/lora/3", "--into", str(tmp_path / "again"))
    assert (code, found["verdict"]) == (0, "reproduced")
    assert found["found"] == pytest.approx(found["recorded"], rel=EXACT)
    again = TrialFolder(tmp_path / "again")
    assert read_json(again.outcome)["best_value"] == found["found"]
    assert found["recorded"] == read_json(trained.outcome)["best_value"]
    assert again.adapter.is_dir()
    assert not [each for each in found["differences"] if not each["what"].startswith("git.")]


def test_other_data_are_named_and_not_trained_on(
    trained: TrialFolder, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of the data file both digests are told, exit code 11, and no trial is there."""
    monkeypatch.chdir(user)
    write_rows(user / "my.jsonl", "product")
    try:
        code, found = ask(str(trained.path), "--into", str(tmp_path / "again"))
    finally:
        write_rows(user / "my.jsonl", "sum")
    assert (code, found["verdict"], found["found"]) == (11, "other_inputs", None)
    named = {each["what"]: each for each in found["differences"]}
    recorded = read_json(trained.provenance)["data.digest"]
    assert named["data.digest"]["recorded"] == recorded != named["data.digest"]["now"]
    assert recorded in found["why"]
    assert not (tmp_path / "again" / "outcome.json").exists()


def test_another_figure_is_told_with_what_differs(
    trained: TrialFolder, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that another torch made, and whose figure is far off: exit code 10, both named."""
    monkeypatch.chdir(user)
    forged = copied(trained, tmp_path / "forged")
    outcome = read_json(forged.outcome)
    write_json(forged.outcome, {**outcome, "best_value": outcome["best_value"] - 0.5})
    write_json(forged.provenance, {**read_json(forged.provenance), "package.torch": "2.0.0"})
    code, found = ask(str(forged.path), "--into", str(tmp_path / "again"))
    assert (code, found["verdict"]) == (10, "differs")
    assert found["found"] - found["recorded"] == pytest.approx(0.5, abs=1e-6)
    torch = next(each for each in found["differences"] if each["what"] == "package.torch")
    assert torch["recorded"] == "2.0.0"
    assert found["why"].endswith("package.torch")


def test_an_mlflow_run_alone_is_enough(
    trained: TrialFolder, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its run's id a trial is found with settings, origin and figure as its folder has them."""
    monkeypatch.chdir(user)
    client = MlflowClient(local_uri(user / "mlruns"))
    experiment = client.get_experiment_by_name("single trials")
    (run,) = client.search_runs([experiment.experiment_id])
    store = TrackingStore(None, user / "mlruns")
    by_run = find_record(run.info.run_id, Path("outputs"), store)
    by_folder = find_record(str(trained.path), Path("outputs"), None)
    assert by_run.settings == by_folder.settings
    assert by_run.origin == by_folder.origin
    assert by_run.value == by_folder.value
    with pytest.raises(TrackingError, match="0000"):
        find_record("0" * 32, Path("outputs"), store)
    with pytest.raises(ConfigError, match="tracking=none"):
        find_record("0" * 32, Path("outputs"), None)


def test_trials_are_named_in_a_few_ways(trained: TrialFolder, tmp_path: Path) -> None:
    """STUDY/ARM/NUMBER with and without zeros, a further seed's; anything else is explained."""
    study = StudyFolder(tmp_path / "other")
    copied(trained, study.trial("lora", 7).path)
    copied(trained, study.finalist("lora", 7, 1).path)
    for name in ("other/lora/7", "other/lora/0007", "other/lora/trial_0007", "other/lora/7_seed_1"):
        assert find_record(name, tmp_path, None).value > 0
    with pytest.raises(StudyError, match="STUDY/ARM/NUMBER"):
        find_record("other/lora/best", tmp_path, None)
    with pytest.raises(StudyError, match="trial_0008"):
        find_record("other/lora/8", tmp_path, None)
    with pytest.raises(StudyError, match="no results of a study 'nope'"):
        find_record("nope", tmp_path, None)


def test_a_pruned_trial_has_nothing_to_reproduce(trained: TrialFolder, tmp_path: Path) -> None:
    """What stopped it was the study: it is told so."""
    folder = copied(trained, tmp_path / "pruned")
    write_json(folder.outcome, Outcome(cause="pruned", best_value=4.0, steps=2).model_dump())
    with pytest.raises(StudyError, match="ended as pruned after 2 steps"):
        find_record(str(folder.path), tmp_path, None)


def test_the_base_is_pinned_to_the_commit_of_the_record(
    trained: TrialFolder, tmp_path: Path
) -> None:
    """A base from a hub, of whichever commit was the newest then."""
    folder = copied(trained, tmp_path / "hub")
    write_json(folder.provenance, {**read_json(folder.provenance), "base.commit": "abc123"})
    assert find_record(str(folder.path), tmp_path, None).settings.model.revision == "abc123"


@pytest.mark.parametrize(
    "override", ["seed=1", "training.max_steps=2", "+experiment=lr_rank_sweep"]
)
def test_no_override_changes_the_trial(trained: TrialFolder, override: str) -> None:
    """Only who trains and who records may be set."""
    refused = CliRunner().invoke(app, ["reproduce", str(trained.path), override])
    assert (refused.exit_code, "would be another trial" in refused.output) == (2, True)


@pytest.mark.parametrize(
    ("facts", "changed", "allowed"),
    [
        (CPU, [], EXACT * 4.0),
        (CPU, ["git.commit", "python"], EXACT * 4.0),
        (CPU, ["package.peft"], ROUNDING * (FACTS.base_value("eval/loss") - 4.0)),
        (CPU.model_copy(update={"device": "NVIDIA H200"}), [], None),
    ],
    ids=["same machine", "other code", "other package", "GPU"],
)
def test_tolerance_follows_from_what_differs(
    facts: ArmBaseline, changed: Sequence[str], allowed: float | None
) -> None:
    """Same bits where nothing that adds numbers differs; a share of the gain everywhere else."""
    then = {
        **origin(provenance(""), facts),
        **dict.fromkeys(changed, "other"),
        "git.dirty": "false",
    }
    record = RecordedTrial("mine", make_settings().trial, then, 4.0, Path("config.yaml"))
    found = [each for each in differing(record, facts) if each.what != "git.dirty"]
    assert [each.what for each in found] == changed
    wanted = ROUNDING * (FACTS.base_value("eval/loss") - 4.0) if allowed is None else allowed
    assert allowance(record, facts, found)[0] == pytest.approx(wanted)


def copied(trial: TrialFolder, to: Path) -> TrialFolder:
    """What a reproduction reads of a trial, elsewhere."""
    folder = TrialFolder(to)
    to.mkdir(parents=True, exist_ok=True)
    for path in (trial.config, trial.provenance, trial.outcome):
        (to / path.name).write_bytes(path.read_bytes())
    return folder
