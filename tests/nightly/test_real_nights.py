"""Nights of the program itself: embedded base and data, a real MLflow server, dates that are set.

Nothing is replaced: the command is a person's, the trainer trains, and only the wall clock of its
processes is another one (tests/faults/clock.c).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from sweeper.core.paths import NightFolder, NightsFolder
from sweeper.nightly.night_record import EntryRecord, NightRecord, read_record
from tests.faults.clock import WallClock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FIRST = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
MODEL = "lr_rank_sweep"
STEPS = 24
PROGRAM = ("-m", "sweeper")
SMALL = (
    *("~hydra.sweeper.arms.full", f"training.max_steps={STEPS}", "training.eval_steps=8"),
    *("finalists=none", "pruner=none", "training.early_stopping_patience=null"),
    *("adapter.r=8", "adapter.alpha_over_r=2", "adapter.target_modules=attention"),
)
FAKE = ("workers=fake", "workers.fake.step_seconds=0.1")


@dataclass(frozen=True)
class House:
    """A folder of a user's own, in which nights are run on dates that are given."""

    folder: Path
    clock: WallClock
    server: str

    def write_set(self, *more: str, **keys: Any) -> None:
        """The set `mine`: lr_rank_sweep on the embedded data, three trials a study."""
        overrides = [*SMALL, f"tracking.uri={self.server}", *more]
        entry = {
            "experiment": "lr_rank_sweep",
            "n_trials": 3,
            "extend_by": 1,
            "overrides": overrides,
        }
        entry |= {"policy": "continue", "gate": "embedded"}
        text = {"defaults": ["default", "_self_"], "experiments": [entry], **keys}
        folder = self.folder / "conf" / "nightly"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")

    def fire(
        self, number: int, minutes: int = 0, program: Sequence[str] = PROGRAM
    ) -> subprocess.Popen[str]:
        """A scheduler's firing in a night."""
        self.clock.set_to((FIRST + timedelta(days=number, minutes=minutes)).timestamp())
        return self.start("nightly", "mine", program=program)

    def start(self, *arguments: str, program: Sequence[str] = PROGRAM) -> subprocess.Popen[str]:
        """One command, with the clock as it stands."""
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.clock.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def night(self, number: int) -> NightFolder:
        """Where a night is recorded."""
        return NightsFolder.under(self.folder / "outputs").night("mine", str(day(number)))

    def record(self, number: int) -> NightRecord:
        """What a night recorded."""
        found = read_record(self.night(number))
        assert found is not None
        return found

    def entry(self, number: int) -> EntryRecord:
        """What became of the experiment in a night."""
        return self.record(number).entries[MODEL]

    def study(self, number: int) -> Path:
        """The study that a night began."""
        return self.folder / "outputs" / f"mine_{MODEL}_{day(number)}"

    def champion(self) -> str:
        """Which version has the alias."""
        found = MlflowClient(self.server).get_model_version_by_alias(MODEL, "champion")
        return str(found.version)


def day(number: int) -> date:
    """The local date of a night, counted from 0."""
    return (FIRST + timedelta(days=number)).date()


def end(process: subprocess.Popen[str], exit_code: int) -> tuple[str, str]:
    """Wait for a command; returns what it printed, and its complaints."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == exit_code, output + errors
    return output, errors


def until(happens: Callable[[], Any], process: subprocess.Popen[str], what: str) -> None:
    """Wait for a state while a command runs."""
    while not happens():
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of a command and of its workers."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.communicate()


@dataclass(frozen=True)
class Server:
    """`mlflow server` in a process group of its own."""

    uri: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path) -> Server:
        """Start it, and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        with (folder / "server.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        server = cls(f"http://127.0.0.1:{port}", process)
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{server.uri}/health", timeout=5):
                return server
            time.sleep(0.5)

    def kill(self) -> None:
        """With its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started once: it takes half a minute."""
    started = Server.start(tmp_path_factory.mktemp("server"))
    yield started
    started.kill()


@pytest.fixture
def house(tmp_path: Path, server: Server) -> House:
    """An empty folder, and a clock."""
    return House(tmp_path, WallClock.build(tmp_path), server.uri)


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, server: Server) -> House:
    """Three nights, of which the third finds other data; some of them exit with 10."""
    folder = tmp_path_factory.mktemp("week")
    house = House(folder, WallClock.build(folder), server.uri)
    house.write_set()
    end(house.fire(0), 10)
    end(house.fire(1), 0)
    house.write_set("data.max_samples=1200", "data.train=embedded")
    house.fire(2).communicate(timeout=900)
    return house


def test_night_two_continues_night_one(week: House) -> None:
    """One study: three trials of the first night, one more of the second, each trained once."""
    first, second = week.entry(0), week.entry(1)
    assert first.decided
    assert second.decided
    assert (first.decided.choice, second.decided.choice) == ("new", "continue")
    assert second.decided.study_name == first.decided.study_name
    assert (first.causes, second.causes) == ({"finished": 3}, {"finished": 1})
    results = json.loads((week.study(0) / "results.json").read_text())
    assert len(results["arms"]["lora"]["trials"]) == 4


def test_other_data_are_a_new_study_and_the_champion_is_judged_again(week: House) -> None:
    """Night 3 begins anew, tries the old winner first, and duels with the champion on the gate."""
    third = week.entry(2)
    assert third.decided
    assert (third.decided.choice, third.decided.study_name) == ("new", week.study(2).name)
    assert "data" in third.decided.reason
    assert third.decided.warm_start == (week.study(0).name,)
    assert third.champion
    assert third.champion.champion == f"version {1}"
    # Another point on other data may be better, worse, or too near to tell without further seeds
    assert third.champion.verdict in ("promoted", "kept", "undecided")


def test_a_promotion_and_a_refusal_have_their_evidence(week: House) -> None:
    """Night 1's best beats the untuned base by its whole interval; a refusal leaves the champion."""
    first, *later = (week.entry(number).champion for number in range(3))
    assert first
    assert (first.verdict, first.champion) == ("promoted", None)
    # Night 2 adds to night 1's study, whose best is the champion already
    refused = [decision for decision in later if decision and decision.evidence]
    refused = [decision for decision in refused if decision.verdict != "promoted"]
    assert refused
    assert all(decision.champion == "version 1" for decision in refused)
    for decision in (first, *refused):
        assert re.search(r"-?\d\.\d+", decision.reason), decision.reason
    tags = MlflowClient(week.server).get_model_version(MODEL, "1").tags
    assert tags["sweeper.reason"] == first.reason


def test_every_night_has_its_page(week: House) -> None:
    """Markdown, HTML and a run at the server, each with the night's best value."""
    client = MlflowClient(week.server)
    found = client.get_experiment_by_name("nightly")
    assert found is not None
    runs = {run.info.run_name: run for run in client.search_runs([found.experiment_id])}
    for number in range(3):
        best = week.entry(number).best
        assert best
        words = f"{best.value:.4f}"
        assert words in week.night(number).digest.read_text()
        assert words in week.night(number).page.read_text()
        assert words in runs[f"mine {day(number)}"].data.tags["mlflow.note.content"]


def test_rollback_gives_the_alias_back(week: House) -> None:
    """Another trial promoted by hand, then rolled back: version 1 is the champion again."""
    before = week.champion()
    number = next(n for n in range(3) if n != week.entry(0).best.number)  # type: ignore[union-attr]
    end(_champion(week, "promote", MODEL, week.study(0).name, f"lora/{number:04d}"), 0)
    assert week.champion() != before
    end(_champion(week, "rollback", MODEL), 0)
    assert week.champion() == before


def test_a_champion_is_certified_on_its_test_split(week: House) -> None:
    """The first look at the test split: better than the untuned base, kept in the version's tags."""
    output, _ = end(_champion(week, "certify", MODEL), 0)
    tags = MlflowClient(week.server).get_model_version(MODEL, week.champion()).tags
    assert "sweeper.certified.1" in tags
    assert "better" in output or "below" in output, output


def _champion(house: House, *words: str) -> subprocess.Popen[str]:
    return house.start("champion", *words, f"tracking.uri={house.server}")


def test_a_night_killed_in_the_middle_is_completed_once(house: House) -> None:
    """kill -9 during the second trial, fired again: three trials in all, the first not trained anew."""
    house.write_set()
    victim = house.fire(0)
    outcomes = house.study(0) / "lora"
    until(lambda: list(outcomes.glob("trial_0001/metrics.jsonl")), victim, "the second trial")
    kill(victim)
    first = next(outcomes.glob("trial_0000/outcome.json")).stat().st_mtime_ns
    house.fire(0, minutes=10).communicate(timeout=900)
    entry = house.entry(0)
    assert (sum(entry.causes.values()), entry.status, house.record(0).starts) == (3, "done", 2)
    assert (outcomes / "trial_0000" / "outcome.json").stat().st_mtime_ns == first
    spool = (outcomes / "trial_0001" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in spool if "eval/loss" in line]
    assert steps == sorted(set(steps))
    output, _ = end(house.fire(0, minutes=20), 0)
    assert "has been run" in output or "ran" in output, output


def test_a_night_without_its_server_says_so_and_is_shipped_later(
    house: House, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """MLflow dies in mid-night: trials finish, the digest says what is missing; sync brings it."""
    folder = tmp_path_factory.mktemp("mortal")
    mortal = Server.start(folder)
    night = House(house.folder, house.clock, mortal.uri)
    night.write_set(*FAKE)
    fired = night.fire(0)
    until(lambda: list(night.study(0).glob("lora/*/outcome.json")), fired, "the first trial")
    mortal.kill()
    fired.communicate(timeout=900)
    assert sum(night.entry(0).causes.values()) == 3
    text = night.night(0).digest.read_text()
    assert mortal.uri.removeprefix("http://") in text, text


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """outputs/ as a small file system of its own."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or _fails(command):
        pytest.skip("a disk that can be filled needs the right to mount a tmpfs (run as root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fails(command: Sequence[str]) -> bool:
    return subprocess.run(command, check=False).returncode != 0


IMPATIENT = """
import sys
from sweeper.search import storage
from sweeper.workers import worker
storage.PATIENCE_S = worker.FULL_DISK_PATIENCE_S = 10.0
from sweeper.__main__ import main
main()
"""
"""The program with ten seconds of patience instead of 15 minutes; inline workers share the process."""


def test_a_night_on_a_full_disk_leaves_its_digest_on_stderr(house: House, disk: Path) -> None:
    """Full from mid-night on: once patience is over its page is printed, with the reason."""
    house.write_set(*FAKE, "workers.engine=inline")
    fired = house.fire(0, program=("-c", IMPATIENT))
    until(lambda: list(house.study(0).glob("lora/*/outcome.json")), fired, "the first trial")
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (2**16, 1):
            with suppress(OSError):
                while True:
                    ballast.write(b"x" * size)
    output, errors = end(fired, 1)
    assert f"# Nightly mine, {day(0)}" in errors, output + errors
    assert "No space left on device" in errors
    assert "Traceback" not in output + errors, output + errors
