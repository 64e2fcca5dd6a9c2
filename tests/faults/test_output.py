"""S8: output is no part of the work: closed, full, of another encoding; a disk without inodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeper.commands import guarded_steps
from sweeper.commands.guarded_steps import GuardedSteps
from tests.faults.sweep import FAKE, STUDY

OUTPUTS = {
    "closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "full": "> /dev/full 2> /dev/full",
    "a reader that leaves": "2>&1 | head -c 1",
}
COMMAND = (*FAKE, f"hydra.sweeper.study_name={STUDY}", "tracking=none", "hydra.sweeper.n_trials=2")


def _run(
    folder: Path, output: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    words = " ".join(f"'{word}'" for word in (*COMMAND, "-m"))
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m sweeper {words} {output}"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _check_answer(folder: Path) -> None:
    study = folder / "outputs" / STUDY
    assert (study / "report.html").is_file()
    assert (study / "report.md").is_file()
    assert len(json.loads((study / "results.json").read_text())["arms"]["lora"]["trials"]) == 2
    assert json.loads((study / "standing.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_study_ends_as_usual_whatever_takes_its_output(output: str, tmp_path: Path) -> None:
    """Exit code 0, the whole answer, and the status of a finished study."""
    done = _run(tmp_path, OUTPUTS[output], {})
    assert done.returncode == 0, done.stdout + done.stderr
    _check_answer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_study_ends_as_usual_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    """What the terminal lacks becomes a question mark."""
    done = _run(tmp_path, "", {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    _check_answer(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """outputs/ as a file system with few inodes."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m,nr_inodes=400", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("a disk without inodes needs the right to mount a tmpfs (run as root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_end_of_a_study_waits_for_inodes(small_disk: Path, tmp_path: Path) -> None:
    """Not one file can be made in the middle of a study: it ends when there is room again."""
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *COMMAND, "workers.fake.step_seconds=0.2", "-m"],
        cwd=tmp_path,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        metrics = small_disk / STUDY / "lora" / "trial_0001" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not metrics.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ballast = small_disk / "ballast"
        ballast.mkdir()
        for number in range(1000):
            try:
                (ballast / str(number)).touch()
            except OSError:
                break
        time.sleep(20)
        assert process.poll() is None, (tmp_path / "log").read_text()
        shutil.rmtree(ballast)
        assert process.wait(250) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
    _check_answer(tmp_path)


def test_every_step_is_taken_whatever_becomes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step waits for space, another error is told and kept, and Ctrl-C ends the list."""
    said: list[str] = []
    taken: list[str] = []
    full = iter([True, True, False])

    def write() -> None:
        if next(full):
            raise OSError(28, "No space left on device")
        taken.append("results")

    def fail() -> None:
        raise ValueError("odd figure")

    monkeypatch.setattr(
        guarded_steps, "lacks_space", lambda error, folder: isinstance(error, OSError)
    )
    steps = GuardedSteps(tmp_path, said.append, sleep=lambda seconds: None)
    steps.take("results.json", write)
    steps.take("report.html", fail)
    steps.take("the status", lambda: taken.append("status"))
    assert taken == ["results", "status"]
    assert "Waiting for space" in said[0]
    assert "report.html: not written" in said[1]
    with pytest.raises(ValueError, match="odd figure"):
        steps.raise_first()


def test_a_disk_that_stays_full_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps together wait as long as a worker does."""
    monkeypatch.setattr(guarded_steps, "lacks_space", lambda error, folder: True)
    waited: list[float] = []
    steps = GuardedSteps(tmp_path, lambda text: None, sleep=waited.append)

    def never() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "results.json"))

    for name in ("results.json", "report.html"):
        steps.take(name, never)
    assert sum(waited) == guarded_steps.SPACE_PATIENCE_S
    with pytest.raises(OSError, match="No space left"):
        steps.raise_first()
