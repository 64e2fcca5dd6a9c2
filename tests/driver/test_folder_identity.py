"""What lies in a study's folder is continued only by the study and the trial that wrote it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from sweeper.commands.run_study import run_study
from sweeper.commands.run_trial import train_single
from sweeper.core.errors import StudyError, StudyMismatch
from sweeper.core.paths import StudyFolder, TrialFolder, read_json, write_atomic, write_json
from sweeper.core.trial_identity import TrialIdentity
from sweeper.driver.folder_claims import FolderClaims
from sweeper.reporting.results import StudyResults, load_results
from sweeper.search.study_plan import single, studies
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.tracker import NullTracker, TrialRecord

NAME = "mine"
FAKE = (
    *("+experiment=lr_rank_sweep", f"hydra.sweeper.study_name={NAME}", "workers=fake"),
    *("workers.engine=inline", "workers.fake.step_seconds=0.0", "pruner=none", "verbosity=quiet"),
    "hydra.sweeper.priors=[]",
    *("~hydra.sweeper.arms.full", "hydra.sweeper.n_trials=2"),
    *("hydra.sweeper.finalists.seeds=2", "hydra.sweeper.finalists.fresh_seeds=2"),
    "hydra.sweeper.fairness.min_finished=1",
)
LOW, HIGH = "training.learning_rate=0.001", "training.learning_rate=0.02"
FOLDER = StudyFolder(Path("outputs", NAME))
OTHER_STORAGE = "hydra.sweeper.storage=sqlite:///other.db"


def slow(value: object) -> object:
    """Mark a parameter whose kind another one shows in the fast tier."""
    return pytest.param(value, marks=pytest.mark.slow)


Sever = Callable[[], tuple[str, ...]]
"""Separates the folder from its study's storage, and returns the overrides that the next start needs."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A folder with an empty store of MLflow."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def _run(*overrides: str, recorded: bool = False) -> StudyResults:
    tracking = f"tracking.uri=sqlite:///{Path.cwd()}/mlflow.db" if recorded else "tracking=none"
    (plan,) = studies([*FAKE, tracking, *overrides])
    return run_study(plan)


def _answer() -> list[object]:
    """The part of the stored answer that the time of day does not change."""
    return [
        (arm.best, arm.tried, arm.final and arm.final.test_losses)
        for arm in load_results(NAME, Path("outputs")).arms
    ]


def _runs() -> dict[str, list[Run]]:
    """The runs in MLflow by their names, the oldest first."""
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    found: dict[str, list[Run]] = {}
    for run in client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]):
        found.setdefault(run.info.run_name, []).append(run)
    return found


def _kill_in(folder: TrialFolder) -> None:
    """Leave a finished fake trial as if it had been killed after its checkpoint at step 8."""
    folder.outcome.unlink()
    write_json(folder.checkpoints / "fake.json", {"step": 8, "best": 0.1, "best_step": 8})


def _steps(folder: TrialFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def _settings(folder: TrialFolder) -> dict[str, object]:
    config = json.loads(folder.config.read_text())
    return {"lr": config["training"]["learning_rate"], "r": config["adapter"]["r"]}


def _switched() -> tuple[str, ...]:
    return (OTHER_STORAGE,)


def _deleted() -> tuple[str, ...]:
    FOLDER.database.unlink()
    return ()


def _emptied() -> tuple[str, ...]:
    storage = f"sqlite:///{FOLDER.database}"
    for name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    return ()


def _truncated() -> tuple[str, ...]:
    FOLDER.database.write_bytes(b"")
    return ()


def _replaced() -> tuple[str, ...]:
    """The database of another study of the same name, as after a mistaken copy."""
    kept = FOLDER.path.rename("kept")
    _run(HIGH, "hydra.sweeper.n_trials=1")
    FOLDER.database.rename("database")
    shutil.rmtree(FOLDER.path)
    kept.rename(FOLDER.path)
    Path("database").rename(FOLDER.database)
    return ()


@pytest.mark.parametrize(
    "sever", [_switched, _deleted, *map(slow, (_emptied, _truncated, _replaced))]
)
def test_a_trial_never_continues_the_work_of_another_study(
    sever: Sever, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at 1e-3, then started at 2e-2 on another storage: trained from the first step.

    The earlier folders are as they were, under another name.
    """
    _run(LOW)
    _kill_in(FOLDER.trial("lora", 1))
    before = {
        str(path.relative_to(FOLDER.path)): path.read_bytes()
        for path in (FOLDER.path / "lora").rglob("*")
        if path.is_file()
    }
    overrides = sever()
    capsys.readouterr()
    results = _run(HIGH, *overrides, "verbosity=normal")
    continued = FOLDER.trial("lora", 1)
    assert _settings(continued)["lr"] == 0.02
    assert _steps(continued)[0] < 8
    (aside,) = (FOLDER.set_aside / "studies").iterdir()
    after = {name: (aside / name).read_bytes() for name in before}
    assert after == before
    text = " ".join(capsys.readouterr().out.split())
    assert "holds the trials of another study of this name" in text
    assert str(aside) in text.replace(" ", "")
    assert results.arms[0].tried == 2


def test_a_study_gets_its_trials_back() -> None:
    """Two storages in turn under one name: each finds its own trials, answer and runs again."""
    _run(LOW, recorded=True)
    answer, database = _answer(), FOLDER.database.read_bytes()
    low = {path.name for path in (FOLDER.path / "lora").iterdir()}
    (earlier,) = _runs()["lora/0000"]
    high = (HIGH, OTHER_STORAGE, "hydra.sweeper.n_trials=1")
    _run(*high, recorded=True)
    assert _answer() != answer
    assert FOLDER.database.read_bytes() == database
    _run(LOW, recorded=True)
    assert {path.name for path in (FOLDER.path / "lora").iterdir()} == low
    assert _answer() == answer
    assert [_settings(FOLDER.trial("lora", number))["lr"] for number in (0, 1)] == [0.001] * 2
    _run(*high, recorded=True)
    assert _settings(FOLDER.trial("lora", 0))["lr"] == 0.02
    runs = _runs()
    assert [run.info.status for run in runs[NAME]] == ["FINISHED", "FINISHED"]
    first, second = runs["lora/0000"]
    assert first.data.to_dictionary() == earlier.data.to_dictionary()
    assert second.data.params["training.learning_rate"] == "0.02"


def test_a_start_that_ends_early_leaves_the_answer_of_the_other_study() -> None:
    """A mistaken storage and a question that fails: every file of the answer stays as it was."""
    _run(LOW)
    before = {path: path.read_bytes() for path in FOLDER.answers if path.is_file()}
    with pytest.raises(StudyMismatch, match="fork_of=nowhere"):
        _run(LOW, OTHER_STORAGE, "hydra.sweeper.fork_of=nowhere")
    assert {path: path.read_bytes() for path in FOLDER.answers if path.is_file()} == before
    answer = _answer()
    _run(LOW)
    assert _answer() == answer
    assert FOLDER.trial("lora", 0).outcome.exists()


@pytest.mark.parametrize("name", [slow("copy.db"), "outputs/mine/copy.db"])
def test_a_copied_database_keeps_the_folder(name: str) -> None:
    """The study was moved to another storage, as docs/servers.md suggests: nothing is set aside."""
    _run(LOW)
    answer = _answer()
    shutil.copy(FOLDER.database, name)
    FOLDER.database.unlink()
    _run(LOW, f"hydra.sweeper.storage=sqlite:///{name}")
    assert not FOLDER.set_aside.exists()
    assert _answer() == answer


def test_trials_later_than_a_restored_database_are_set_aside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The backup knows two of four trials, and draws others: those start from their first step.

    MLflow keeps the earlier runs, and the new trials have runs of their own.
    """
    _run(LOW, recorded=True)
    shutil.copy(FOLDER.database, "backup.db")
    _run(LOW, "hydra.sweeper.n_trials=4", recorded=True)
    later = FOLDER.trial("lora", 3)
    _kill_in(later)
    was = _settings(later)
    shutil.copy("backup.db", FOLDER.database)
    capsys.readouterr()
    other_draws = ("sampler=random", "hydra.sweeper.sampler.seed=7")
    _run(LOW, "hydra.sweeper.n_trials=4", *other_draws, "verbosity=normal", recorded=True)
    assert _settings(later) != was
    assert _steps(later)[0] < 8
    aside = TrialFolder(FOLDER.set_aside / "trials" / "lora" / "trial_0003")
    assert _settings(aside) == was
    assert (aside.checkpoints / "fake.json").exists()
    assert "lora/0003" in capsys.readouterr().out
    runs = _runs()
    assert runs["lora/0003"][0].data.params["adapter.r"] == str(was["r"])
    assert runs["lora/0003_2"][0].data.params["adapter.r"] == str(_settings(later)["r"])


@pytest.mark.slow
def test_a_kill_between_a_move_and_its_record_gives_the_new_trial_a_run_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder lies in set_aside and MLflow's ledger does not know it: the next start records it."""
    _run(LOW, recorded=True)
    shutil.copy(FOLDER.database, "backup.db")
    _run(LOW, "hydra.sweeper.n_trials=4", recorded=True)
    later = FOLDER.trial("lora", 3)
    _kill_in(later)
    was = _settings(later)
    shutil.copy("backup.db", FOLDER.database)
    again = ("hydra.sweeper.n_trials=4", "sampler=random", "hydra.sweeper.sampler.seed=7")

    def killed(*_: object) -> None:
        raise SystemExit

    for _ in ("lora/0002", "lora/0003"):  # each start meets one more of them
        with monkeypatch.context() as patch:
            patch.setattr(MlflowTracker, "set_aside", killed)
            with pytest.raises(SystemExit):
                _run(LOW, *again, recorded=True)
    _run(LOW, *again, recorded=True)
    runs = _runs()
    for key in ("lora/0002", "lora/0003"):
        assert len(runs[key]) == len(runs[f"{key}_2"]) == 1
        assert runs[key][0].info.status != "RUNNING"
    assert runs["lora/0003"][0].data.params["adapter.r"] == str(was["r"])
    assert runs["lora/0003_2"][0].data.params["adapter.r"] == str(_settings(later)["r"])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["study", "trial"])
def test_the_folder_of_a_finished_trial_is_claimed_when_its_arm_is_opened(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replaced by another trial's: moved away with a message, before anything hands out its weights."""
    _run(LOW)
    own, other = FOLDER.trial("lora", 0), FOLDER.trial("lora", 1)
    _altered(own, key, "another")
    was = own.outcome.stat().st_ino
    capsys.readouterr()
    _run(LOW, "verbosity=normal")
    aside = TrialFolder(FOLDER.set_aside / "trials" / "lora" / "trial_0000")
    assert aside.outcome.stat().st_ino == was
    assert not own.path.exists()
    assert other.outcome.exists()
    output = " ".join(capsys.readouterr().out.split())
    assert f"lora/0000: {own.path} holds the work of another trial ({key} another" in output


@pytest.mark.parametrize(("study", "key"), [("other", "lora/0000"), ("mine", "lora/0001")])
def test_a_finished_trial_of_another_study_or_number_is_set_aside(study: str, key: str) -> None:
    """Its folder is moved with all that is in it. One of the study's own stays."""
    claims = FolderClaims(FOLDER, "mine", NullTracker(), print)
    for number, identity in enumerate(((study, key), ("mine", "lora/0001"))):
        folder = FOLDER.trial("lora", number)
        named = TrialIdentity(study=identity[0], trial=identity[1], seed=0, settings="x")
        write_atomic(folder.identity, named.model_dump_json())
        claims.recall(TrialRecord(f"lora/{number:04d}", folder, {}))
    assert not FOLDER.trial("lora", 0).path.exists()
    assert TrialFolder(FOLDER.set_aside / "trials" / "lora" / "trial_0000").identity.exists()
    assert FOLDER.trial("lora", 1).identity.exists()


@pytest.mark.slow
def test_a_cancelled_trial_that_cannot_be_continued_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its folder was trained with another rate: the point is trained from its first step."""
    _run(LOW)
    folder = FOLDER.trial("lora", 1)
    _kill_in(folder)
    _another_rate(folder)
    with closing(sqlite3.connect(FOLDER.database)) as database, database:
        database.execute("update trials set state = 'FAIL' where number = 1")
    study = optuna.load_study(study_name=f"{NAME}/lora", storage=f"sqlite:///{FOLDER.database}")
    study.enqueue_trial(study.trials[1].params, user_attrs={"continues": 1})
    capsys.readouterr()
    _run(LOW, "hydra.sweeper.n_trials=3", "verbosity=normal")
    assert _steps(FOLDER.trial("lora", 2))[0] < 8
    output = " ".join(capsys.readouterr().out.split())
    assert (
        f"lora/0002: starts from its first step. {folder.path}, which it continues, holds" in output
    )


def _another_seed(folder: TrialFolder) -> None:
    _altered(folder, "seed", 5)


def _another_rate(folder: TrialFolder) -> None:
    config = json.loads(folder.config.read_text())
    config["training"]["learning_rate"] = 0.5
    write_atomic(folder.config, json.dumps(config))
    folder.identity.unlink()


def _another_number(folder: TrialFolder) -> None:
    _altered(folder, "trial", "lora/0009_seed_1")


def _another_base(folder: TrialFolder) -> None:
    identity = read_json(folder.identity)
    _altered(folder, "inputs", {**identity["inputs"], "base": "another"})


def _another_base_of_old(folder: TrialFolder) -> None:
    origin = read_json(folder.provenance)
    write_json(folder.provenance, {**origin, "base.digest": "another"})
    folder.identity.unlink()


def _unreadable(folder: TrialFolder) -> None:
    write_atomic(folder.config, "training: [")
    folder.identity.unlink()


def _altered(folder: TrialFolder, key: str, value: object) -> None:
    write_json(folder.identity, {**read_json(folder.identity), key: value})


@pytest.mark.parametrize(
    "alter",
    [
        *(_another_rate, _another_base),
        *map(slow, (_another_seed, _another_number, _another_base_of_old, _unreadable)),
    ],
)
def test_the_outcome_of_another_finalist_is_not_reused(
    alter: Callable[[TrialFolder], None],
) -> None:
    """Whatever contradicts: the finalist is trained again, and the folder is kept under set_aside."""
    _run(LOW)
    (path,) = FOLDER.finalists("lora").glob("trial_*_seed_1")
    finalist = TrialFolder(path)
    was = finalist.outcome.stat().st_ino
    alter(finalist)
    _run(LOW)
    assert finalist.outcome.stat().st_ino != was
    aside = FOLDER.set_aside / "trials" / "lora" / "finalists" / path.name
    assert TrialFolder(aside).outcome.stat().st_ino == was


def test_the_folders_of_an_older_version_are_recognised() -> None:
    """Without any identity, config.yaml and provenance.json show that nothing contradicts."""
    _run(LOW)
    answer = _answer()
    for path in FOLDER.path.rglob("identity.json"):
        path.unlink()
    storage = f"sqlite:///{FOLDER.database}"
    study = optuna.load_study(study_name=f"{NAME}/lora", storage=storage)
    study._storage.set_study_user_attr(study._study_id, "uuid", None)
    _run(LOW)
    assert not FOLDER.set_aside.exists()
    assert _answer() == answer
    assert FOLDER.identity.exists()


def test_losses_of_another_model_are_judged_again() -> None:
    """The losses on the test split belong to settings and inputs, not to a trial's number."""
    _run(LOW)
    files = sorted(FOLDER.finalists("lora").glob("test/*/*.json"))
    assert len(files) == 3
    _run(HIGH, OTHER_STORAGE)
    assert not set(files) & set(FOLDER.finalists("lora").glob("test/*/*.json"))


@pytest.mark.parametrize("attribute", ["facts", slow("uuid")])
def test_a_kill_while_an_arm_is_opened_leaves_one_study(
    attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the study's UUID or its facts are stored: later starts find one owner."""
    real = optuna.Study.set_user_attr

    def killed(study: optuna.Study, key: str, value: object) -> None:
        if key == attribute:
            raise SystemExit
        real(study, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", killed)
        with pytest.raises(SystemExit):
            _run(LOW)
    _run(LOW, "hydra.sweeper.n_trials=1")
    _run(LOW, "hydra.sweeper.n_trials=1")
    assert not FOLDER.set_aside.exists()


def test_a_link_to_a_trial_of_another_study_is_not_trained_in() -> None:
    """A fork links to its original's trials: even one that matches is not continued."""
    _run(LOW)
    (path,) = FOLDER.finalists("lora").glob("trial_*_seed_1")
    original = TrialFolder(Path("original").absolute())
    path.rename(original.path)
    original.identity.unlink()
    original.outcome.unlink()
    before = {each.name for each in original.path.iterdir()}
    path.symlink_to(original.path)
    _run(LOW)
    assert {each.name for each in original.path.iterdir()} == before
    assert TrialFolder(path).outcome.exists()
    assert not path.is_symlink()


def test_a_trial_that_cannot_be_set_aside_stops_the_study() -> None:
    """`set_aside` is a file: refused in words, and nothing of the other trial is touched."""
    _run(LOW)
    (path,) = FOLDER.finalists("lora").glob("trial_*_seed_1")
    _another_rate(TrialFolder(path))
    FOLDER.set_aside.write_text("")
    was = TrialFolder(path).outcome.read_bytes()
    with pytest.raises(StudyError, match="cannot be moved"):
        _run(LOW)
    assert TrialFolder(path).outcome.read_bytes() == was


def test_a_single_trial_refuses_the_beginning_of_another() -> None:
    """`sweeper trial --into FOLDER` does not continue what another trial has begun there."""
    folder = TrialFolder(Path("again"))

    def train(rate: str) -> None:
        fake = ("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0")
        settings = single([*fake, rate, "tracking=none"])
        train_single(settings, folder, "", Console(quiet=True))

    train(LOW)
    _kill_in(folder)
    with pytest.raises(StudyError, match="holds the beginning of another trial"):
        train(HIGH)
    assert (folder.checkpoints / "fake.json").exists()
    train(LOW)
    assert folder.outcome.exists()


@pytest.mark.slow
def test_a_column_that_is_ignored_later_makes_no_other_study() -> None:
    """A later version may refuse a column of the data. The setting that it names continues the study."""
    _run()
    (arm,) = _run("hydra.sweeper.n_trials=3", "data.ignore_columns=[document]").arms
    assert len(arm.trials) == 3
    assert arm.final is not None
    assert arm.final.test_losses
    assert not FOLDER.set_aside.exists()
