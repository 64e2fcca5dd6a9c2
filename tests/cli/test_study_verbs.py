"""`sweeper study …` as a user types it: against a real driver, after its end, and with wrong words."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from sweeper.cli.verbs import app
from sweeper.commands.steer import KEPT, study_folder, values_of
from sweeper.core.errors import CommandRefused
from sweeper.core.paths import StudyFolder, read_json, write_json
from sweeper.driver.command_files import ExtendArm
from sweeper.reporting.study_status import is_driven
from tests.conftest import Program

pytestmark = pytest.mark.timeout(900)
NAME = "lr_rank_sweep"
STUDY = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "pruner=none"),
    *("~hydra.sweeper.arms.full", "hydra.sweeper.n_trials=3", "finalists=none"),
    "workers.fake.step_seconds=0.1",
)
PATIENCE_S = 300.0


def _start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    """A study whose first trial is in the middle of its twenty steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *STUDY, *overrides, "-m"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    spool = tmp_path / "outputs" / NAME / "lora" / "trial_0000" / "metrics.jsonl"
    _wait(lambda: spool.exists() and bool(spool.read_text()))
    return process


def _wait(until: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def _study(tmp_path: Path, *arguments: str) -> Result:
    where = ["--output-dir", str(tmp_path / "outputs")]
    return CliRunner().invoke(app, ["study", *arguments, *where])


def _shown(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_study(tmp_path, "show", NAME, "--json").stdout)
    return found


@pytest.fixture
def ended(tmp_path: Path) -> StudyFolder:
    """The folder of a study whose driver was killed: a standing, and nobody who holds the lock."""
    folder = StudyFolder(tmp_path / "outputs" / NAME)
    write_json(
        folder.standing,
        {
            "study_name": NAME,
            "state": "running",
            "command": "+experiment=lr_rank_sweep -m",
            "since": "2026-11-22 08:00:00",
            "process": 1,
            "host": "here",
            "objective": {
                **{"metric": "eval/loss", "direction": "minimize", "pruning_metric": None},
            },
            "left": "1 h 05 min left",
            "arms": [
                {
                    **{"name": "lora", "wanted": 12, "done": 2, "queue": [{"adapter.r": 4}]},
                    "trials": {"finished": 1, "oom": 1},
                    "best": {
                        **{"trial": "lora/0001", "state": "finished", "value": 4.0801},
                        "point": {"training.learning_rate": 0.003, "adapter.r": 8},
                    },
                }
            ],
            "running": [{"trial": "lora/0002", "state": "running", "point": {"adapter.r": 2}}],
        },
    )
    return folder


def test_a_study_is_steered_from_another_terminal(tmp_path: Path) -> None:
    """Pause ends the worker and holds everything; then enqueue, extend, resume, stop: as documented."""
    process = _start(tmp_path)
    worker = psutil.Process(process.pid).children(recursive=True)
    try:
        paused = _study(tmp_path, "pause", NAME, "--timeout", "60", "--json")
        assert (paused.exit_code, json.loads(paused.stdout)["result"]) == (0, "applied")
        _wait(lambda: not any(each.is_running() and _trains(each) for each in worker))
        _wait(lambda: _shown(tmp_path)["running"][0]["state"] == "paused")
        assert process.poll() is None
        assert _shown(tmp_path)["state"] == "paused"
        refused = _study(tmp_path, "enqueue", NAME, "adapter.r=5", "--timeout", "60")
        assert refused.exit_code == 2
        assert "adapter.r=5: not in choice(2, 4, 8, 16, 32)" in refused.stderr
        for arguments in (
            ("enqueue", NAME, "adapter.r=32", "training.learning_rate=2e-3"),
            ("extend", NAME, "--trials", "1"),
            ("resume", NAME),
            ("stop", NAME),
        ):
            assert _study(tmp_path, *arguments, "--timeout", "60").exit_code == 0
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    for words in (
        "study pause: pausing: waiting for 1 running trial to stop",
        "study enqueue: refused: adapter.r=5: not in choice(2, 4, 8, 16, 32)",
        "study extend --trials 1: arm lora extended from 3 to 4 trials",
        "study stop: stopping: waiting for 1 running trial to end. No new trials will start.",
        "Resume     python -m sweeper +experiment=lr_rank_sweep",
    ):
        assert words in output
    shown = _shown(tmp_path)
    assert shown["state"] == "stopped"
    assert shown["arms"][0]["trials"] == {"finished": 1}
    assert shown["arms"][0]["queue"][0] == {"adapter.r": 32, "training.learning_rate": 0.002}
    assert "stopped" in _study(tmp_path, "list").stdout


def _trains(process: psutil.Process) -> bool:
    """Whether it is a worker that lives; multiprocessing's resource tracker stays."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended; a zombie if its driver has not waited for it yet
        return False


@pytest.mark.slow
def test_a_pause_ends_the_process_that_holds_the_model(
    tmp_path: Path, rows_file: Path, tiny_base: Path
) -> None:
    """With the real trainer: its memory is free, and the trial goes on from its checkpoint."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", "tracking=none"),
            *(f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none"),
            *("~hydra.sweeper.arms.full", "finalists=none", "hydra.sweeper.n_trials=1"),
            *("space=tiny", "training=tiny", "evaluation=tiny", "training.max_steps=4000"),
            *("training.eval_steps=50", f"hydra.sweeper.study_name={NAME}", "-m"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    trial = tmp_path / "outputs" / NAME / "lora" / "trial_0000"
    try:
        _wait(lambda: trial.joinpath("metrics.jsonl").exists() or process.poll() is not None)
        assert process.poll() is None, process.stdout and process.stdout.read()
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if _trains(child)]
        assert _study(tmp_path, "pause", NAME, "--timeout", "60").exit_code == 0
        gone, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
        assert (len(gone), alive) == (len(workers), [])
        checkpoints = list(trial.glob("checkpoints/checkpoint-*"))
        assert checkpoints
        _wait(lambda: _shown(tmp_path)["running"][0]["state"] == "paused")
        reached = _shown(tmp_path)["running"][0]["step"]
        assert _study(tmp_path, "resume", NAME, "--timeout", "60").exit_code == 0
        _wait(lambda: _shown(tmp_path)["running"][0]["step"] > reached)
        assert _study(tmp_path, "stop", NAME, "--now", "--timeout", "60").exit_code == 0
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    outcome = read_json(trial / "outcome.json")
    assert (outcome["cause"], read_json(trial / "provenance.json")["attempt"]) == ("cancelled", 1)


def test_an_ended_study_is_shown_and_listed(tmp_path: Path, ended: StudyFolder) -> None:
    """Killed without a word: nothing runs any more, and the command that goes on is printed."""
    assert not is_driven(ended)
    shown = _study(tmp_path, "show", NAME)
    assert shown.exit_code == 0
    for words in ("lr_rank_sweep: killed", "2 of 12", "1 finished, 1 oom", "4.0801"):
        assert words in shown.stdout
    assert "Start again  python -m sweeper +experiment=lr_rank_sweep -m" in shown.stdout
    assert "lora/0002" not in shown.stdout
    assert "1 h 05 min" not in shown.stdout
    (listed,) = json.loads(_study(tmp_path, "list", "--json").stdout)
    assert (listed["study_name"], listed["state"]) == (NAME, "killed")


def test_without_a_driver_a_command_is_kept_or_refused(tmp_path: Path, ended: StudyFolder) -> None:
    """Exit code 3 and the command that obeys it; 2 for what only a driver can do."""
    kept = _study(tmp_path, "extend", NAME, "--trials", "3", "--json")
    assert kept.exit_code == KEPT
    document = json.loads(kept.stdout)
    assert (document["study"], document["result"]) == (NAME, "kept")
    assert document["command"] == ExtendArm(trials=3).model_dump()
    assert len(list(ended.inbox.iterdir())) == 1
    for verb in ("pause", "resume", "stop"):
        refused = _study(tmp_path, verb, NAME)
        assert refused.exit_code == 2
        assert f"there is nothing to {verb}" in refused.stderr
    assert len(list(ended.inbox.iterdir())) == 1


@pytest.mark.parametrize("name", ["nope", "../lr_rank_sweep", "/etc", "a;reboot", "$(reboot)", "."])
def test_what_is_no_study_is_refused_with_those_there_are(
    tmp_path: Path, ended: StudyFolder, name: str
) -> None:
    """A name is never taken for a path, nor for anything a shell would run."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CommandRefused, match=r"no study .* under .*; studies there: lr_rank_sweep"):
        study_folder(name, tmp_path / "outputs")
    refused = _study(tmp_path, "extend", name, "--trials", "1")
    assert refused.exit_code == 2
    assert "studies there: lr_rank_sweep" in refused.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        *(["study", "list"], ["study", "show"], ["report"], ["best"], ["sync", "s"]),
        *(["clean", "s"], ["nightly", "status"], ["reproduce", "s"]),
    ],
    ids=" ".join,
)
def test_a_file_is_no_folder_of_studies(tmp_path: Path, words: list[str]) -> None:
    """Not an empty folder, of which every look would say that nothing is there."""
    (tmp_path / "rows.jsonl").write_text("{}")
    done = CliRunner().invoke(app, [*words, "--output-dir", str(tmp_path / "rows.jsonl")])
    assert done.exit_code == 2
    assert "is a file" in done.output


def test_no_studies_at_all(tmp_path: Path) -> None:
    """Said, not shown as an empty table."""
    assert "there are no studies under" in _study(tmp_path, "list").stdout
    assert json.loads(_study(tmp_path, "list", "--json").stdout) == []
    with pytest.raises(CommandRefused, match="there are no studies yet"):
        study_folder(NAME, tmp_path)


def test_studies_of_another_version_are_named(tmp_path: Path, ended: StudyFolder) -> None:
    """A standing that cannot be read, or none beside the results, hides no other study."""
    write_json(StudyFolder(tmp_path / "outputs" / "old").results, {"format": 1})
    listed = _study(tmp_path, "list").stdout
    assert "killed" in listed
    assert "of another version, see sweeper report: old" in listed
    write_json(ended.standing, {"format": 99})
    assert "another version of sweeper" in _study(tmp_path, "show", NAME).output


@pytest.mark.parametrize(
    "arguments",
    [
        ("extend", NAME, "--trials", "0"),
        ("extend", NAME),
        ("stop", NAME, "--trial", "-1"),
        ("clone", NAME, "x", "adapter.r=4"),
        ("enqueue", NAME),
        ("pause", NAME, "--timeout", "-1"),
    ],
)
def test_wrong_arguments_exit_with_2(
    tmp_path: Path, ended: StudyFolder, arguments: tuple[str, ...]
) -> None:
    """Before anything is sent."""
    assert _study(tmp_path, *arguments).exit_code == 2
    assert not ended.inbox.exists()


@pytest.mark.parametrize("texts", [["adapter.r"], ["=4"], ["adapter.r="], ["a.b=1", "a.b=2"]])
def test_values_are_key_and_value(texts: list[str]) -> None:
    """Anything else is refused by name."""
    with pytest.raises(CommandRefused, match=r"KEY=VALUE|given twice"):
        values_of(texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arm", "lora"), "only with --trial"),
        (("--trial", "3", "--now"), "a single trial is always stopped at once"),
    ],
)
def test_stop_takes_options_that_belong_together(
    tmp_path: Path, ended: StudyFolder, arguments: tuple[str, ...], words: str
) -> None:
    """A study is stopped as a whole, a trial at once."""
    refused = _study(tmp_path, "stop", NAME, *arguments)
    assert words in refused.output


def test_the_program_exits_with_the_documented_codes(
    in_process: Program, ended: StudyFolder
) -> None:
    """From the folder of the project: 3 kept, 2 unknown, no traceback."""
    kept = in_process("study", "extend", NAME, "--trials", "1")
    assert kept.returncode == KEPT, kept.stderr
    unknown = in_process("study", "show", "nope")
    assert unknown.returncode == 2
    assert "no study 'nope' under outputs/; studies there: lr_rank_sweep" in unknown.stderr
    assert "Traceback" not in unknown.stderr
