"""S12: no name that is read from a file leads out of the folder that the file speaks for."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial
from pydantic import ValidationError

from sweeper.commands.retention import removals
from sweeper.core.errors import StudyError, TrackingError
from sweeper.core.paths import NightsFolder, StudyFolder, write_json
from sweeper.driver.folder_moves import end_move
from sweeper.driver.folder_owner import settle_owner
from sweeper.nightly.night_claims import NightLog
from sweeper.nightly.night_record import EntryDecision
from sweeper.reporting.results import load_results, to_document
from sweeper.search.study import UUID, require_readable
from sweeper.tracking.registry import ModelRegistry
from sweeper.tracking.tracking_ledger import TrackingLedger
from sweeper.tracking.tracking_server import TrackingServer
from tests.conftest import Program, run_program
from tests.reporting.studies import two_arms

NAMES = ("../x", "../../x", "/x", "a/../../x", "..", ".", "", "a\0b", "a" * 300, "a\nb", "a\\..\\b")
ODD = "out %41 dir?x#y [v2]"


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """A study with results, and a trial of somebody else beside it."""
    folder = StudyFolder(tmp_path / "outputs" / "mine")
    write_json(folder.results, to_document(two_arms(4.0, 3.9)))
    for path in (tmp_path / "x", tmp_path / "outputs" / "x"):
        (path / "trial_0001" / "adapter").mkdir(parents=True)
        (path / "trial_0001" / "adapter" / "weights").write_text("precious")
    return folder


def _outside(tmp_path: Path) -> set[str]:
    return {str(path) for path in tmp_path.rglob("*") if "mine" not in path.parts}


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_of_another_name_is_no_answer(
    study: StudyFolder, name: str, tmp_path: Path, in_process: Program
) -> None:
    """report and clean refuse the file; nothing outside is written or deleted."""
    document = json.loads(study.results.read_text())
    document["arms"] = {name: document["arms"]["lora"]}
    study.results.write_text(json.dumps(document))
    before = _outside(tmp_path)
    with pytest.raises(StudyError, match=r"results\.json"):
        removals("mine", tmp_path / "outputs", 0)
    for words in (["clean", "mine", "tracking=none"], ["report", "mine", "--format", "html"]):
        assert in_process(*words).returncode == 1, words
    assert _outside(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_called_as_its_folder(
    study: StudyFolder, name: str, tmp_path: Path, in_process: Program
) -> None:
    """Whatever name its file gives, the page is written beside the file."""
    document = {**json.loads(study.results.read_text()), "study_name": name}
    study.results.write_text(json.dumps(document))
    before = _outside(tmp_path)
    assert load_results("mine", tmp_path / "outputs").study_name == "mine"
    assert in_process("report", "mine", "--format", "html").returncode == 0
    assert study.page.exists()
    assert _outside(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_an_owner_of_another_name_leads_nowhere(name: str, tmp_path: Path) -> None:
    """identity.json, or the storage, names the place to which a study is set aside."""
    folder = StudyFolder(tmp_path / "outputs" / "mine")
    trial = folder.path / "lora" / "trial_0000"
    trial.mkdir(parents=True)
    folder.identity.write_text(json.dumps({"study": name}))
    settle_owner(folder, name or None, opened=False)
    settle_owner(folder, "other", opened=True)
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"mine"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (".", "")])
def test_an_entry_of_the_ledger_uploads_nothing_from_outside(name: str, tmp_path: Path) -> None:
    """A trial's folder, a file of the study, and a key: each is told, and left out."""
    tracking = tmp_path / "outputs" / "mine" / ".tracking"
    entry = {"key": "lora/0001", "uid": "u", "folder": "../" + name, "params": {}, "tags": {}}
    entry |= {"started_ms": 1}
    study = {"uid": "u", "experiment": "e", "name": "n", "metric": "m", "direction": "minimize"}
    study |= {
        "params": {},
        "tags": {},
        "started_ms": 1,
        "opened_ms": 1,
        "artifacts": ["../" + name],
    }
    write_json(tracking / "study.json", study)
    write_json(tracking / "runs/lora/0001.json", entry)
    write_json(tracking / "runs/lora/0002.json", {**entry, "folder": "lora", "key": name})
    ledger = TrackingLedger(tracking)
    inside = {found.folder for found in ledger.trials.values()} - {"lora"}
    for folder in inside:
        place = (tracking.parent / folder).resolve()
        assert place.is_relative_to(tmp_path / "outputs"), folder
    assert all(key.startswith("lora/") for key in ledger.trials)
    assert ledger.problems


@pytest.mark.parametrize("name", NAMES)
def test_a_night_names_only_studies(name: str) -> None:
    """Retention after a night deletes in the studies that night.json names."""
    with pytest.raises(ValidationError):
        EntryDecision(
            choice="new",
            reason="",
            study_name=name,
            identity={},
            n_trials=1,
            warm_start=(),
            ended_before={},
            seconds_before=0.0,
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("a\nb", "a" * 300)])
@pytest.mark.parametrize("key", ["source", "target", "moved", "copied"])
def test_a_stored_move_stays_in_the_folder(key: str, name: str, tmp_path: Path) -> None:
    """move.json of a killed driver: nothing is moved, copied or deleted outside, nor the study."""
    folder = StudyFolder(tmp_path / "outputs" / "mine")
    for place in (folder.path, tmp_path / "outputs", tmp_path):
        (place / "x").mkdir(parents=True)
        (place / "x" / "weights").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    move = {"source": "x", "target": "set_aside", "moved": ["weights"], "emptied": True}
    move[key] = [name] if key in ("moved", "copied") else name
    write_json(folder.set_aside / "move.json", move)
    with suppress(StudyError):
        end_move(folder)
    outside = [path for path in sorted(tmp_path.rglob("*")) if folder.path not in path.parents]
    assert outside == [path for path in before if folder.path not in path.parents]
    assert len([*folder.path.rglob("weights")]) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != ""])
def test_a_uuid_of_another_form_is_a_damaged_study(name: str, tmp_path: Path) -> None:
    """The storage names the folder to which a study is set aside: refused, with the way out."""
    if name == "a" * 300:  # of which eight letters are used
        return
    study = optuna.create_study(study_name="mine/lora")
    study.set_user_attr(UUID, name)
    with pytest.raises(StudyError, match=r"uuid: .* is no UUID.*study_name=mine_2"):
        require_readable(study)


def test_an_outcome_of_another_form_is_a_damaged_study() -> None:
    """The trial and its key are named, with the way out."""
    study = optuna.create_study(study_name="mine/lora")
    study.add_trial(create_trial(value=1.0, user_attrs={"outcome": {"../x": 1}}))
    with pytest.raises(StudyError, match=r"trial 0: .*study_name=mine_2"):
        require_readable(study)


def test_a_folder_that_cannot_be_is_no_champions(tmp_path: Path, empty_store: Path) -> None:
    """What the registry says is read before anything is deleted: it is a sentence."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = TrackingServer(None, tmp_path).client()
    run = client.create_run("0")
    client.create_registered_model("m")
    client.create_model_version("m", str(tmp_path), run.info.run_id, tags={"folder": "a\0b"})
    client.set_registered_model_alias("m", "champion", "1")
    with pytest.raises(TrackingError, match="names no folder"):
        ModelRegistry(None, tmp_path).champions()


@pytest.mark.parametrize("process", [-1, 0, 1, "x", None, 1e99, float("inf")])
def test_no_other_process_is_stopped_for_a_night(process: object, tmp_path: Path) -> None:
    """overlap=replace signals the process that a file names: never init, and never everybody."""
    from datetime import UTC, datetime

    nights = NightsFolder.under(tmp_path)
    log = NightLog(nights)
    with log.claim("mine", datetime.now(UTC).date(), datetime.now(UTC)):
        nights.holder("mine").write_text(json.dumps({"process": process, "date": "2026-05-01"}))
        assert log.holder("mine") is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_runs_in_a_folder_of_an_odd_name(tmp_path: Path) -> None:
    """Database, MLflow's store, artifacts, report and sync: all of it lies in that folder."""
    home = tmp_path / ODD
    home.mkdir()
    given = [
        *("+experiment=lr_rank_sweep", "workers=fake", "~hydra.sweeper.arms.full", "pruner=none"),
        *("finalists=none", "hydra.sweeper.n_trials=2", "hydra.sweeper.study_name=mine"),
        *(f"output_dir='{ODD}'", "-m"),
    ]
    for _ in range(2):
        done = run_program(given, home)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "not recorded" not in done.stdout + done.stderr
    assert (home / ODD / "mine" / "study.db").stat().st_size > 0
    assert (home / "mlruns" / "mlflow.db").stat().st_size > 0
    assert {path.name for path in home.iterdir()} == {ODD, "mlruns"}
    # MLflow makes an empty folder of the quoted name beside it
    strays = [path for path in tmp_path.rglob("*") if path.is_file() and home not in path.parents]
    assert strays == []
    synced = run_program(["sync", "--output-dir", ODD], home)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    shown = run_program(["report", "mine", "--output-dir", ODD], home)
    assert shown.returncode == 0, shown.stderr
