"""S12: every name in a file that this program wrote is hostile in turn, and leads nowhere.

The names are found, not listed: every text of a real study's files and databases.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from sweeper.__main__ import main
from sweeper.commands.run_study import run_study
from sweeper.core.errors import SweeperError, sentence
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import NightsFolder, StudyFolder
from sweeper.core.stored_files import _TOLD
from sweeper.driver.folder_owner import settle_owner
from sweeper.nightly.night_claims import NightLog
from sweeper.nightly.night_run import run_night
from sweeper.reporting.split_looks import count_look
from sweeper.search.study_plan import studies
from tests.faults.stored_names import CANARY, StoredText, names_of, replace_text, texts_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAME = "mine"
FAKE = (
    *("+experiment=lr_rank_sweep", f"hydra.sweeper.study_name={NAME}", "workers=fake"),
    *("workers.engine=inline", "workers.fake.step_seconds=0.0", "pruner=none", "sampler=random"),
    *("~hydra.sweeper.arms.full", "tracking.uri=sqlite:///mlflow.db", "finalists=none"),
)
NIGHT = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
NIGHTS = NightsFolder.under(Path("outputs"))
HARMLESS = {
    "source": "set_aside/studies/older",
    "target": ".",
    "moved": ["lora"],
    "copied": ["note"],
    "emptied": True,
}
"""A move of a killed driver: its source holds what it names, and nothing of the study is in its way."""
FAST = ("up twice", "absolute", "NUL", "dots")
"""Kinds of hostile names that stand for the others where a run takes seconds."""
OPTUNAS = ("trials", "trial_params", "trial_values", "trial_intermediate_values")
"""Tables of study.db whose dates, domains and numbers Optuna reads by itself."""
NONSENSE = ("x", "", "[]", "null", '{"type": "float"}', '{"name": 3}', -1, 10**18, 1e999, b"\xff")
"""What may lie in a cell of a damaged database instead of a date, a domain or a number."""
UNREAD = {"outputs/nightly/mine.running.json"}
"""Files that are read only while another process runs a night."""
WHERE = ("", "user", "home", "home/outputs")
"""Folders, relative to the test's own, in which something lies that a hostile name may lead to."""


def hostile_names(root: Path) -> dict[str, str]:
    """Names that lead out of a study's folder, or to no file at all."""
    return {
        "up": "../x",
        "up twice": "../../x",
        "up thrice": "../../../x",
        "in and up": "lora/../../../x",
        "absolute": str(root / "x"),
        "home": "~/x",
        "NUL": "a\0b",
        "long": "a" * 300,
        "empty": "",
        "dot": ".",
        "dots": "..",
        "newline": "a\nb",
        "surrogate": "\udc80",
    }


KINDS = tuple(hostile_names(Path()))


class StoredWorld:
    """A home folder with a finished study and a night, and files outside that must stay as they are."""

    def __init__(self, root: Path, empty_store: Path, *, nights: bool) -> None:
        self.root, self.pristine = root / "world", root / "pristine"
        self.home = self.root / "home"
        self.study = StudyFolder(self.home / "outputs" / NAME)
        self.home.mkdir(parents=True)
        self._make(empty_store, nights=nights)
        self._watched = self._outside()
        shutil.copytree(self.root, self.pristine, symlinks=True)
        inside = [path for path in self.home.rglob("*") if self._is_inside(path)]
        files = [path for path in inside if path.is_file()]
        self._inside = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
        self._folders = [path for path in inside if path.is_dir()]
        places = (self.study.path, self.home / "outputs" / "nightly")
        self.texts = [text for place in places for text in texts_of(self.home, place)]
        self.names = names_of(self.home, self.texts)

    def restore(self) -> None:
        """Put the files of the study and the nights back, and forget what was told of them."""
        _TOLD.clear()
        for path in self.home.rglob("*"):
            is_new = path not in self._inside and self._is_inside(path)
            if is_new and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        for path, (content, stamp) in self._inside.items():
            if not path.is_file() or path.stat().st_mtime_ns != stamp:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                os.utime(path, ns=(stamp, stamp))
        for path in self._folders:
            path.mkdir(parents=True, exist_ok=True)

    def put_back(self) -> None:
        """Put everything back, also what lies outside."""
        shutil.rmtree(self.root)
        shutil.copytree(self.pristine, self.root, symlinks=True)

    def damage(self) -> list[str]:
        """Return what happened outside the study and the nights, and which file outside was copied."""
        found = self._outside()
        paths = sorted({*found, *self._watched})
        changed = [path for path in paths if found.get(path) != self._watched.get(path)]
        new = (path for path in self.home.rglob("*") if path.is_file() and self._is_inside(path))
        copied = [path for path in new if self._is_changed(path) and CANARY in _words(path)]
        return [f"{path} changed" for path in changed] + [f"{path}: copied" for path in copied]

    def _is_changed(self, path: Path) -> bool:
        return path not in self._inside or path.stat().st_mtime_ns != self._inside[path][1]

    def _is_inside(self, path: Path) -> bool:
        inside = ("outputs/mine", "outputs/nightly", "outputs/reproduced", "mlruns", "mlflow.db")
        # a fork's looks are counted in the study from which it began
        inside += ("outputs/mine_lr_rank_sweep", "outputs/mine_fork", "outputs/other")
        return str(path.relative_to(self.home)).startswith(inside)

    def _outside(self) -> dict[str, tuple[object, ...]]:
        """Return size and times of everything that no command may touch."""
        watched: dict[str, tuple[object, ...]] = {}
        for path in self.root.rglob("*"):
            if not (path.is_relative_to(self.home) and self._is_inside(path)):
                found = path.stat()
                shared = path in (self.home, self.home / "outputs")  # whose entries are watched
                times = () if shared else (found.st_mtime_ns, found.st_size)
                watched[str(path.relative_to(self.root))] = (path.is_dir(), *times)
        return watched

    def differences(self) -> list[str]:
        """Return the files outside whose bytes differ from those at the beginning."""
        pairs = {path: self.pristine / path for path in self._watched}
        return [
            path
            for path, kept in pairs.items()
            if kept.is_file() and (self.root / path).read_bytes() != kept.read_bytes()
        ]

    def _make(self, empty_store: Path, *, nights: bool) -> None:
        shutil.copy(empty_store, self.home / "mlflow.db")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.home)
            (plan,) = studies([*FAKE, "hydra.sweeper.n_trials=2"])
            run_study(plan)
            _write_set(self.home)
            if nights:
                assert run_night("mine", clock=lambda: NIGHT) == "no change"
            else:
                with NightLog(NIGHTS).claim("mine", NIGHT.date(), NIGHT):
                    pass
        _add_what_a_small_study_lacks(self.study)
        holder = self.home / NIGHTS.holder("mine")
        holder.write_text(json.dumps({"process": os.getpid(), "date": "2026-05-01"}))
        for place in WHERE:
            _put_outside(self.root / place, self.study, canary=place != "home/outputs")
        other = self.home / "outputs" / "other"
        other.mkdir()
        (other / "looks.json").write_text('{"looks": []}')


def _words(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _write_set(home: Path) -> None:
    overrides = [text for text in FAKE if not text.startswith(("+", "hydra.", "tracking"))]
    entry = {
        "experiment": "lr_rank_sweep",
        "overrides": [*overrides, "tracking=none"],
        "n_trials": 1,
        "policy": "continue",
        "extend_by": 1,
    }
    folder = home / "conf" / "nightly"
    folder.mkdir(parents=True)
    text = {"defaults": ["default", "_self_"], "experiments": [entry]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(text))


def _add_what_a_small_study_lacks(study: StudyFolder) -> None:
    """Write the files of studies with weights, finalists, moves, commands and forks."""
    best = json.loads(study.results.read_text())["arms"]["lora"]["best"]
    trial = study.trial("lora", best)
    trial.adapter.mkdir()
    (trial.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    form = {"base": None, "revision": None, "base_digest": "b", "architecture": "Llama"}
    form |= {"quantization": "nf4", "dtype": "float32", "max_length": 8, "template": "plain"}
    form |= {"end_tokens": ["</s>"], "data_digest": "d"}
    (trial.adapter / "trained_form.json").write_text(json.dumps(form))
    (trial.adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "lora"}')
    write_manifest(trial.adapter)
    sample = {"category": "lora", "prompt": "lora", "base": "lora", "tuned": "lora"}
    trial.samples.with_suffix(".json").write_text(json.dumps([sample]))
    study.set_aside.mkdir()
    (study.set_aside / "move.json").write_text(json.dumps(HARMLESS))
    (study.set_aside / "studies" / "older" / "lora").mkdir(parents=True)
    (study.set_aside / "studies" / "older" / "note").write_text("a note")
    look = {"at": "2026-05-01T00:00:00Z", "study": NAME, "split": "rows", "models": "lora"}
    study.looks.write_text(json.dumps({"looks": [look], "fork_of": "other"}))
    identity = f"{1:020d}-0000000a"
    command = {"verb": "enqueue", "values": {"adapter.r": "8"}, "arm": "lora"}
    study.inbox.mkdir(exist_ok=True)
    (study.inbox / f"{identity}.json").write_text(json.dumps(command))
    answered = {"at": "lora", "command": command, "answer": {"ok": True, "text": "lora"}}
    record = {"totals": {"lora": 2}, "commands": {identity.replace("a", "b"): answered}}
    study.steering.write_text(json.dumps(record))


def _put_outside(folder: Path, study: StudyFolder, *, canary: bool) -> None:
    """Write files that would be read, changed or deleted as those of a study, an arm or a trial."""
    place = folder / "x"
    shutil.copytree(study.path / "lora", place)
    shutil.copytree(study.path / "lora" / "trial_0000", place, dirs_exist_ok=True)
    shutil.copytree(place / "trial_0000", place / "trial_0003")
    for name in ("results.json", "standing.json", "report.md", "study.db"):
        shutil.copy2(study.path / name, place / name)
    (place / "looks.json").write_text('{"looks": []}')
    (place / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (place / "weights.zip").write_text("an archive")
    for name in ("x.json", "x.lock", "x.running.json", "x.db"):
        (folder / name).write_text("{}")
    words = CANARY if canary else "no file outside"
    for name in ("samples.json", "data_card.md", "note", "report.md", "training_log.txt"):
        for each in (place, place / "trial_0000", place / "trial_0003"):
            (each / name).write_text(words)


Command = Callable[[Path], object]


def _verb(*words: str) -> Command:
    def run(home: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["sweeper", *words])
            main()

    run.__name__ = " ".join(words)
    return run


def start(home: Path) -> None:
    """Start the study again, with two trials to go."""
    (plan,) = studies([*FAKE, "tracking=none", "hydra.sweeper.n_trials=4"])
    run_study(plan)


def start_tracked(home: Path) -> None:
    """Start the study again, and ship its runs."""
    (plan,) = studies([*FAKE, "hydra.sweeper.n_trials=2"])
    run_study(plan)


def night(home: Path) -> None:
    """Run the next night of the set, and delete after it."""
    run_night(
        "mine", ["nightly.retention.keep_adapters=0"], clock=lambda: NIGHT + timedelta(days=1)
    )


def same_night(home: Path) -> None:
    """Run the same night again, as after a kill."""
    with closing(sqlite3.connect("outputs/nightly/nights.db")) as database, database:
        database.execute("update nights set ended_at = null, result = null")
    run_night("mine", ["nightly.retention.keep_adapters=0"], clock=lambda: NIGHT)


def look(home: Path) -> None:
    """Count a look at the test split, as a study with finalists does."""
    folder = StudyFolder(Path("outputs") / NAME)
    stored = json.loads(folder.looks.read_bytes())
    forked = stored.get("fork_of")
    count_look(folder, forked if forked == "other" else None, "rows", "more models")
    count_look(folder, "other", "rows", "other models")


def look_of_a_fork(home: Path) -> None:
    """Count a look in a fork of the study, whose family the study's own file names."""
    count_look(StudyFolder(Path("outputs") / "mine_fork"), NAME, "rows", "models of the fork")


def move(home: Path) -> None:
    """Find out whose folder it is, and end the move that a driver began."""
    settle_owner(StudyFolder(Path("outputs") / NAME), "uuid", opened=False)


REPORT = _verb("report", NAME)
PAGE = _verb("report", NAME, "--format", "html")
CLEAN = _verb("clean", NAME, "tracking=none", "--keep-adapters", "0")
SYNC = _verb("sync", NAME, "tracking.uri=sqlite:///mlflow.db")
SYNC_OF_LEDGER = _verb("sync", NAME)
STATUS = _verb("nightly", "status")
REPRODUCE = _verb(
    *("reproduce", f"{NAME}/lora/0000", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("--into", "outputs/reproduced/again"),
)
CHANGING = (CLEAN, STATUS, look, look_of_a_fork, move)
"""Commands of some milliseconds that delete, move, write or lock what a file names."""
READING = (
    *(REPORT, PAGE, _verb("report", NAME, "--format", "latex"), _verb("best", NAME)),
    *(_verb("best", NAME, "--yaml"), _verb("study", "show", NAME), _verb("study", "list")),
    *(SYNC, SYNC_OF_LEDGER, REPRODUCE),
)
STARTING = (start, start_tracked, night, same_night)


def run(command: Command, home: Path) -> str | None:
    """Run a command, and return the traceback that a user would see, or None."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        patch.chdir(home)
        patch.setenv("HOME", str(home.parent / "user"))
        try:
            command(home)
        except SystemExit as end:
            errors.flush()
            said = errors.buffer.getvalue()  # type: ignore[attr-defined]
            output.flush()
            said += output.buffer.getvalue()  # type: ignore[attr-defined]
            return None if said.strip() else f"no word at exit code {end.code}"
        except (SweeperError, OSError) as error:
            words = sentence(error) if isinstance(error, OSError) else str(error)
            return None if words.strip() else "an empty message"
        except Exception:  # noqa: BLE001 - a user would see a traceback, whatever it is
            return traceback.format_exc()
    return None


def links_out(page: Path) -> list[str]:
    """Return the links of a page that lead to a file of this machine."""
    if not page.is_file():
        return []
    links = re.findall(r"""(?:href|src)=["']?([^"' >]*)""", page.read_text(errors="replace"))
    return [link for link in links if not link.startswith(("#", "data:", "https://"))]


_OPENED: set[str] | None = None
"""Files that were opened since it was set, or None."""


def _note_opened(event: str, arguments: tuple[object, ...]) -> None:
    if _OPENED is not None and event in ("open", "sqlite3.connect"):
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            # not Path.resolve, which opens and reads as well
            _OPENED.add(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100


sys.addaudithook(_note_opened)


def readers_of(world: StoredWorld, commands: Sequence[Command]) -> dict[str, list[Command]]:
    """Return the commands that open each file, as found by running each of them once."""
    global _OPENED
    found: dict[str, list[Command]] = {}
    for command in commands:
        world.restore()
        _OPENED = set()
        assert run(command, world.home) is None, command.__name__
        opened, _OPENED = _OPENED, None
        assert world.damage() == []
        for path in opened:
            if path.startswith(f"{world.home}/"):
                found.setdefault(path.removeprefix(f"{world.home}/"), []).append(command)
    return found


def try_name(
    world: StoredWorld, text: StoredText, value: str, commands: Sequence[Command]
) -> Iterator[str]:
    """Yield what goes wrong in each command that reads a file with another name in it."""
    for command in commands:
        world.restore()
        replace_text(world.home, text, value)
        problem = run(command, world.home)
        damage = world.damage()
        links = [f"links to {link}" for link in links_out(world.study.page)]
        if damage:
            world.put_back()
        for words in [*filter(None, [problem]), *damage, *links]:
            yield f"{text.field} = {value[:40]!r}: {command.__name__}: {words}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> StoredWorld:
    """A finished study, and a night of which only the row in the database is real."""
    return StoredWorld(tmp_path_factory.mktemp("stored"), empty_store, nights=False)


@pytest.fixture(scope="module")
def full_world(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> StoredWorld:
    """A finished study and a night."""
    return StoredWorld(tmp_path_factory.mktemp("stored"), empty_store, nights=True)


@pytest.fixture(scope="module")
def readers(full_world: StoredWorld) -> Mapping[str, Sequence[Command]]:
    """Every command that reads each file."""
    return readers_of(full_world, (*CHANGING, *READING, *STARTING))


def test_a_hostile_name_changes_nothing_outside(world: StoredWorld) -> None:
    """Each name in each file, one after the other, in every command that changes files."""
    found = readers_of(world, CHANGING)
    problems = [
        problem
        for kind in FAST
        for text in world.names
        for problem in try_name(
            world, text, hostile_names(world.root)[kind], found.get(text.file, ())
        )
    ]
    assert problems == world.differences() == []


def test_the_guard_sees_what_is_done_outside(world: StoredWorld) -> None:
    """A file that is changed, one that is deleted, one that is made, and one that is read."""
    world.restore()
    outside = world.home / "x"
    (outside / "note").write_text("another")
    (outside / "weights.zip").unlink()
    (world.root / "x" / "more").touch()
    shutil.copy(world.root / "x" / "note", world.study.path / "note")
    found = world.damage()
    world.put_back()
    assert {"home/x/note changed", "home/x/weights.zip changed", "x/more changed"} <= {*found}
    assert f"{world.study.path / 'note'}: copied" in found


@pytest.mark.parametrize("kind", KINDS)
def test_no_hostile_name_leads_a_verb_out(
    full_world: StoredWorld, readers: Mapping[str, Sequence[Command]], kind: str
) -> None:
    """Each name in each file, in every verb that reads the file: a sentence, or success."""
    value = hostile_names(full_world.root)[kind]
    assert {text.file for text in full_world.names} - {*readers} <= UNREAD
    problems: list[str] = []
    for text in full_world.names:
        commands = [each for each in readers.get(text.file, ()) if each not in STARTING]
        problems += try_name(full_world, text, value, commands)
    assert problems == full_world.differences() == []


@pytest.mark.parametrize("kind", FAST)
def test_no_hostile_name_leads_a_start_out(
    full_world: StoredWorld, readers: Mapping[str, Sequence[Command]], kind: str
) -> None:
    """Each name in each file, when the study is started again or the night falls."""
    value = hostile_names(full_world.root)[kind]
    problems: list[str] = []
    for text in full_world.names:
        commands = [each for each in readers.get(text.file, ()) if each in STARTING]
        problems += try_name(full_world, text, value, commands)
    assert problems == full_world.differences() == []


def test_no_other_text_leads_a_verb_out(
    full_world: StoredWorld, readers: Mapping[str, Sequence[Command]]
) -> None:
    """Every text that is no name: another hostile one, and another verb, for each."""
    values = list(hostile_names(full_world.root).values())
    problems: list[str] = []
    for place, text in enumerate(full_world.texts):
        commands = [each for each in readers.get(text.file, ()) if each not in STARTING]
        if commands and text not in full_world.names:
            command = commands[place // len(values) % len(commands)]
            problems += try_name(full_world, text, values[place % len(values)], [command])
    assert problems == full_world.differences() == []


def cells_of(path: Path) -> list[tuple[str, str]]:
    """Return table and column of every cell that Optuna reads by itself."""
    with closing(sqlite3.connect(path)) as database:
        return [
            (table, column[1])
            for table in OPTUNAS
            for column in database.execute(f"pragma table_info({table})")
        ]


def test_a_damaged_cell_is_named(full_world: StoredWorld) -> None:
    """Each cell of a trial, with every kind of nonsense, in a page: a sentence, or success."""
    path = full_world.study.database
    problems: list[str] = []
    for table, column in cells_of(path):
        # a key or a state that the table's own rules refuse is no case
        change = f"update {table} set {column} = ? where rowid = (select max(rowid) from {table})"
        for value in NONSENSE:
            full_world.restore()
            with (
                closing(sqlite3.connect(path)) as database,
                suppress(sqlite3.IntegrityError),
                database,
            ):
                database.execute(change, (value,))
            problem = run(PAGE, full_world.home)
            gc.collect()  # a cursor that an error left open keeps the database locked
            problems += [f"{table}.{column} = {value!r}: {problem}"] * (problem is not None)
    full_world.restore()
    assert problems == full_world.damage() == []
