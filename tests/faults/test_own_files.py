"""S9: files that this program wrote, after a power cut: a sentence and a way out, never a traceback."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from filelock import FileLock

from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyError, SweeperError, sentence
from sweeper.core.outcome import ExampleLosses, stored_outcome
from sweeper.core.paths import NightFolder, NightsFolder, StudyFolder, TrialFolder
from sweeper.core.spool import MetricsSpool, read_spool
from sweeper.core.stored_files import _TOLD, read_stored
from sweeper.driver.folder_moves import end_move
from sweeper.driver.folder_owner import settle_owner
from sweeper.nightly.night_claims import NightLog
from sweeper.nightly.night_record import read_record
from sweeper.reporting.report_evidence import read_samples
from sweeper.reporting.split_looks import count_look
from sweeper.search.study import open_storage
from sweeper.search.study_plan import studies
from sweeper.training.look_losses import read_looks
from sweeper.training.trial_costs import TrialCosts
from tests.conftest import run_in_process
from tests.faults.conftest import Launch
from tests.reporting.studies import two_arms

NAME = "mine"
FAKE = (
    *("+experiment=lr_rank_sweep", f"hydra.sweeper.study_name={NAME}", "workers=fake"),
    *("workers.engine=inline", "workers.fake.step_seconds=0.0", "pruner=none", "sampler=random"),
    *("~hydra.sweeper.arms.full", "tracking.uri=sqlite:///mlflow.db", "finalists=none"),
)
FILES = (
    *("results.json", "report.md", "standing.json", "steering.json", "identity.json", "study.db"),
    *(".tracking/store.json", ".tracking/study.json", ".tracking/runs/lora/0000.json"),
    *(".tracking/shipped/study.json", ".tracking/shipped/lora/0000.json", "driver.pid"),
    *(f"lora/trial_0000/{name}" for name in ("outcome.json", "metrics.jsonl", "config.yaml")),
    *(f"lora/trial_0000/{name}" for name in ("provenance.json", "identity.json")),
)


def _flipped(path: Path) -> None:
    """Overwrite pages in the middle, as a disk that wrote them elsewhere."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for place in range(size // 4, size, max(1, size // 4)):
            file.seek(place)
            file.write(b"\xa5" * min(64, size - place))


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "flipped": _flipped,
    "list": lambda path: path.write_text("[]\n"),
    "null": lambda path: path.write_text("null\n"),
    "other object": lambda path: path.write_text('{"format": 4, "arms": {"lora": 3}}\n'),
    "nested": lambda path: path.write_text("[" * 10_000 + "]" * 10_000 + "\n"),
    "numbers": lambda path: path.write_text('{"step": "x", "time": NaN, "format": 1e999}\n'),
    "half a character": lambda path: path.write_text('[{"prompt": "\\udc80"}]\n'),
    "folder": _as_folder,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """The folder of a finished study, with its store."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(empty_store, folder / "mlflow.db")
        (plan,) = studies([*FAKE, "hydra.sweeper.n_trials=2"])
        run_study(plan)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    """A copy of the study, with two trials to go."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _TOLD.clear()
    return StudyFolder(Path("outputs") / NAME)


LOOKS = (
    *(["report", NAME], ["best", NAME], ["study", "show", NAME], ["study", "list"]),
    *(["clean", NAME, "--dry-run", "tracking=none"], ["report", NAME, "--format", "html"]),
    ["sync", NAME, "tracking.uri=sqlite:///mlflow.db", "--dry-run"],
)


def _damage(folder: StudyFolder, name: str, damage: str) -> Path:
    path = folder.path / name
    if not path.exists() and name == "steering.json":
        path.write_text('{"totals": {}, "commands": {}}')
    DAMAGES[damage](path)
    return path


def _look(folder: Path) -> None:
    """Every command that reads ends with a code of its own, and without a traceback."""
    for command in LOOKS:
        done = run_in_process(command, folder)
        assert done.returncode in (0, 1, 2), (command, done.stdout, done.stderr)
        assert done.returncode == 0 or done.stderr.strip(), command


def _start() -> SweeperError | str | None:
    """Run two more trials; returns the refusal, if it is one."""
    (plan,) = studies([*FAKE, "hydra.sweeper.n_trials=4"])
    try:
        run_study(plan)
    except SweeperError as error:
        return error
    except OSError as error:
        return sentence(error)
    return None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FILES)
def test_readers_do_without_a_damaged_file(finished: Path, tmp_path: Path, name: str) -> None:
    """Every damage of every file: each verb shows what is left, or names the file."""
    for damage in DAMAGES:
        place = tmp_path / damage.replace(" ", "_")
        shutil.copytree(finished, place)
        _damage(StudyFolder(place / "outputs" / NAME), name, damage)
        _look(place)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_start_does_without_damaged_files(copied: StudyFolder, damage: str) -> None:
    """All files that a study can do without are damaged at once: it comes to its end."""
    for name in FILES:
        if name not in ("study.db", "steering.json"):
            _damage(copied, name, damage)
    refusal = _start()
    if damage == "folder":  # it cannot be replaced by a file
        assert "Move it away" in str(refusal)
        return
    assert refusal is None
    assert len(json.loads(copied.results.read_text())["arms"]["lora"]["trials"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_start_cannot_do_without_names_the_way_out(copied: StudyFolder, damage: str) -> None:
    """The totals that commands have raised: the file, and what is lost by moving it away."""
    path = _damage(copied, "steering.json", damage)
    refusal = _start()
    assert refusal is None or (path.name in str(refusal) and "Move it away" in str(refusal))


@pytest.mark.parametrize("damage", ["half", "noise", "list"])
def test_a_damaged_database_names_the_way_out(damage: str, tmp_path: Path) -> None:
    """The file, what is wrong, and the command that moves it away."""
    folder = StudyFolder(tmp_path / NAME)
    optuna.create_study(storage=open_storage(None, folder), study_name=f"{NAME}/lora")
    DAMAGES[damage](folder.database)
    with pytest.raises(StudyError, match=r"study\.db: the study's database is .*\(mv "):
        optuna.get_all_study_summaries(open_storage(None, folder))


@pytest.mark.parametrize("value", ["{", "\x00", '{"name": "Other", "attributes": {}}'])
def test_a_damaged_cell_of_the_database_names_the_way_out(value: str, tmp_path: Path) -> None:
    """A page that was written elsewhere leaves a table whole, and its values no values."""
    folder = StudyFolder(tmp_path / NAME)
    study = optuna.create_study(storage=open_storage(None, folder), study_name=NAME)
    study.set_user_attr("question", {"a": "b"})
    study.enqueue_trial({"x": 0.5})
    with closing(sqlite3.connect(folder.database)) as database, database:
        database.execute("update study_user_attributes set value_json = ?", (value,))
        database.execute("update trials set state = 'WAITIMG'")
    storage = open_storage(None, folder)
    with pytest.raises(StudyError, match="database is damaged"):
        optuna.load_study(study_name=NAME, storage=storage).get_trials()


@pytest.mark.parametrize("damage", ["empty", "zeros", "nested", "list"])
def test_a_damaged_outcome_is_no_outcome(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told once, with the file and what follows from it."""
    folder = TrialFolder(tmp_path)
    folder.outcome.write_text('{"cause": "finished"}')
    DAMAGES[damage](folder.outcome)
    _TOLD.clear()
    assert [stored_outcome(folder) for _ in range(2)] == [None, None]
    told = capsys.readouterr().err
    assert told.count(str(folder.outcome)) == 1
    assert "has not ended" in told


BROKEN_LINES = (
    "",
    "\0" * 40,
    "{",
    '{"time": 3}',
    "5",
    "null",
    "[]",
    "x" * 300,
    '{"step": "a", "time": 1}',
)


def test_a_damaged_line_costs_that_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands between them, the whole lines are read, and kept by the next attempt."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "time": 1.0, "eval/loss": 2.0}) for step in (1, 2, 3)]
    path.write_text(
        "\n".join([whole[0], *BROKEN_LINES, whole[1], "\udc80".join("ab")[:1], whole[2], ""])
    )
    with path.open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 4')
    _TOLD.clear()
    assert [row["step"] for row in read_spool(path)] == [1, 2, 3]
    assert "line 2, and 11 in all" in capsys.readouterr().err
    MetricsSpool(path, resumed_at=2)
    assert path.read_text() == "\n".join(whole[:2]) + "\n"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_account_of_costs_counts_as_nothing(damage: str, tmp_path: Path) -> None:
    """A trial is continued from its checkpoint without spent.json."""
    path = tmp_path / "spent.json"
    path.write_text(json.dumps(TrialCosts().spent()))
    DAMAGES[damage](path)
    assert TrialCosts.continued(path).metrics()["cost/oom_retries"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["study.db", "mine", "outputs"])
@pytest.mark.parametrize("moment", ["trained", "asked"])
def test_what_is_deleted_in_mid_run_ends_the_study_at_once(
    launch: Launch, what: str, moment: str
) -> None:
    """The database, the study or all studies: no wait as for one that is busy, and a way out."""
    step_s = "workers.fake.step_seconds=" + ("0.2" if moment == "trained" else "0.005")
    sweep = launch("tracking=none", "hydra.sweeper.n_trials=40", step_s, name=NAME)
    sweep.until_steps(1) if moment == "trained" else sweep.until_ended(2)
    places = {"study.db": sweep.study / "study.db", "mine": sweep.study}
    place = places.get(what, sweep.study.parent)
    began = time.monotonic()
    # its programs write meanwhile: a folder that they make again is deleted with the rest
    while place.exists() and time.monotonic() - began < 5:
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink()
    output = " ".join(sweep.end(exit_code=1).split())
    assert time.monotonic() - began < 60
    assert "Traceback" not in output, output
    assert "the study's database is gone" in output, output
    assert "run the same command again" in output


def _looks_of_others(path: Path) -> object:
    """Count a look in a study beside the one whose looks.json is damaged."""
    return count_look(StudyFolder(path.parent.parent / "other"), None, "rows", "models")


def _holder(path: Path) -> object:
    """Ask which process holds a lock that is held."""
    nights = NightsFolder(path.parent)
    with FileLock(nights.lock("mine"), timeout=5):
        return NightLog(nights).holder("mine")


READERS: dict[str, Callable[[Path], object]] = {
    "outputs/mine/looks.json": lambda path: count_look(
        StudyFolder(path.parent), None, "rows", "models"
    ),
    "outputs/mine/./looks.json": _looks_of_others,
    "outputs/mine/set_aside/move.json": lambda path: end_move(StudyFolder(path.parent.parent)),
    "outputs/mine/identity.json": lambda path: settle_owner(
        StudyFolder(path.parent), "uuid", opened=False
    ),
    "outputs/mine/lora/trial_0000/samples.json": lambda path: read_samples(
        StudyFolder(path.parents[2]), two_arms(3.0, 3.1).arms[0]
    ),
    "outputs/mine/lora/trial_0000/look_losses.jsonl": read_looks,
    "outputs/mine/lora/finalists/test/0/trial_0000_seed_0.json": lambda path: read_stored(
        path, ExampleLosses, "the model is judged again"
    ),
    "nightly/mine/2026-05-01/night.json": lambda path: read_record(NightFolder(path.parent)),
    "nightly/mine.running.json": _holder,
}
"""Files that a study without finalists and nights has not, each with what reads it."""


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_damaged_file_says_so_or_does_without(name: str, tmp_path: Path) -> None:
    """Every damage: a value or an error with the file's name, never an error of Python."""
    for damage in DAMAGES:
        path = tmp_path / damage.replace(" ", "_") / name
        path.parent.mkdir(parents=True)
        path.write_text('{"format": 1, "looks": []}')
        DAMAGES[damage](path)
        assert path.name in (_error(READERS[name], path) or path.name), damage


def _error(read: Callable[[Path], object], path: Path) -> str | None:
    try:
        read(path)
    except SweeperError as error:
        return str(error)
    except OSError as error:
        return sentence(error)
    return None


COVERED = {
    # by property of the classes of sweeper/core/paths.py: the file's name in FILES or READERS
    **{"config": "config.yaml", "metrics": "metrics.jsonl", "outcome": "outcome.json"},
    **{"provenance": "provenance.json", "identity": "identity.json", "samples": "samples.json"},
    **{"database": "study.db", "steering": "steering.json", "standing": "standing.json"},
    **{"tracking": "store.json", "looks": "looks.json", "results": "results.json"},
    **{"report": "report.md", "judged_examples": "trial_0000_seed_0.json", "record": "night.json"},
    **{"holder": "mine.running.json", "set_aside": "move.json", "look_losses": "look_losses.jsonl"},
}
OTHERWISE = {
    "spent": "test_a_damaged_account_of_costs_counts_as_nothing",
    "checkpoints": "tests/training/test_checkpoint.py",
    **dict.fromkeys(
        ("adapter", "model", "artifact", "adopted"), "a manifest tells of every change"
    ),
    **dict.fromkeys(("inbox", "outbox"), "tests/driver/test_command_files.py"),
    **dict.fromkeys(("lock", "worker_log", "log_text"), "shown, or locked, and never parsed"),
    **dict.fromkeys(
        ("log_json", "data_card", "archive", "merged", "page", "figures", "digest"),
        "never read again",
    ),
    **dict.fromkeys(("answers", "trial", "finalist", "finalists", "night", "dates"), "no file"),
}
"""Properties without a case here, and what stands in its place."""


def test_every_file_that_is_written_and_read_again_has_a_case() -> None:
    """A file that is added to sweeper/core/paths.py stands in COVERED, or in OTHERWISE with a reason."""
    classes = (TrialFolder, StudyFolder, NightsFolder, NightFolder)
    made = {"under", "path", "continue_from", "forget_checkpoints", "clear_results"}
    named = {name for each in classes for name in vars(each) if not name.startswith("_")} - made
    assert named == set(COVERED) | set(OTHERWISE)
    cases = {Path(name).name for name in (*FILES, *READERS)}
    assert set(COVERED.values()) <= cases
