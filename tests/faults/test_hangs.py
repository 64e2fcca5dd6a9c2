"""R25: workers that freeze before their first step, and inputs that would never end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper.builtin.embedded import BASE_DIR
from tests.faults.conftest import Launch
from tests.faults.sweep import DEADLINE_S

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 15


@pytest.mark.slow
def test_a_worker_frozen_in_its_start_is_replaced(launch: Launch) -> None:
    """SIGSTOP during its imports: announced, killed at the limit, and its successor trains."""
    sweep = launch(
        "tracking=none", "hydra.sweeper.n_trials=2", f"workers.probe_timeout_s={LIMIT_S}"
    )
    (frozen,) = sweep.until(sweep.workers, "a worker started")
    frozen.suspend()
    output = sweep.end()
    assert not frozen.is_running()
    assert f"waiting for a worker to start for 10 s (limit {LIMIT_S} s)" in output
    assert f"worker 0: killed: not ready within {LIMIT_S} s of its start" in output
    sweep.check_each_once(2)


WORDS = {
    "probe": "lora probe: loading base and data",
    "check": "lora/0000: checking whether the trial is possible",
    "judge": "lora/0000_untuned: judging",
}


@pytest.mark.slow
@pytest.mark.parametrize("request_name", WORDS)
def test_a_worker_frozen_before_its_first_step_is_killed(launch: Launch, request_name: str) -> None:
    """SIGSTOP while it loads, checks or judges: announced, killed at the limit, tried again."""
    sweep = launch(
        *("tracking=none", "hydra.sweeper.n_trials=1", f"workers.probe_timeout_s={LIMIT_S}"),
        *("finalists=tiny", f"++workers.fake.requests={{{request_name}: hang}}"),
    )
    said = f"{WORDS[request_name]} for 10 s (limit {LIMIT_S} s, workers.probe_timeout_s)"
    sweep.until(lambda: said in sweep.output, "announced")
    (frozen,) = sweep.workers()
    frozen.suspend()
    key = WORDS[request_name].partition(":")[0]
    killed = f"{key}: killed: no answer for {LIMIT_S} s (workers.probe_timeout_s)"
    sweep.until(lambda: killed in sweep.output, "killed")
    # the words come when the signal is sent, which ends a process a moment later
    sweep.until(lambda: not frozen.is_running(), "gone")
    assert sweep.output.count(said) == 1, "the second attempt began beside the first"
    sweep.until(lambda: sweep.output.count(said) == 2, "the second attempt was announced as well")


def _sweep(folder: Path, *overrides: str) -> tuple[int, str]:
    """Run a sweep with the real trainer to its end, and return its exit code and what it printed."""
    command = [sys.executable, "-m", "sweeper", "+experiment=lr_rank_sweep", "tracking=none"]
    done = subprocess.run(
        [*command, *overrides, "-m"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def _base(folder: Path) -> Path:
    return Path(shutil.copytree(BASE_DIR, folder / "base"))


def test_what_is_no_file_is_refused_before_anything_opens_it(tmp_path: Path) -> None:
    """A pipe as data and template, a device as weights: all of them at once, with their settings."""
    weights = _base(tmp_path) / "model.safetensors"
    weights.unlink()
    weights.symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "own.jinja")
    own = ("data.train=rows.jsonl", "data.template=own.jinja", "model.base_model=base")
    exit_code, said = _sweep(tmp_path, *own)
    assert exit_code == 2, said
    assert "data.train=rows.jsonl is a named pipe (FIFO), not a regular file" in said
    assert "data.template=own.jinja is a named pipe (FIFO), not a regular file" in said
    assert "base/model.safetensors is a link to /dev/zero, a device, not a regular file" in said
    assert not (tmp_path / "outputs").exists()


def _endless_template(folder: Path) -> tuple[str, str]:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "own.jinja").write_text(loops)
    return "data.template=own.jinja", "own.jinja: one conversation is not rendered within 10 s"


def _endless_layers(folder: Path) -> tuple[str, str]:
    path = _base(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 300_000}))
    return "model.base_model=base", r"config.json declares 300,000 layers .* its weights hold \d+"


@pytest.mark.slow
@pytest.mark.parametrize("write", [_endless_template, _endless_layers])
def test_what_would_never_end_is_an_error(
    tmp_path: Path, write: Callable[[Path], tuple[str, str]]
) -> None:
    """Nested loops, and layers that the weights do not hold: exit 1 with the setting and the reason."""
    override, words = write(tmp_path)
    exit_code, said = _sweep(tmp_path, override)
    assert exit_code == 1, said
    assert re.search(words, said), said[-2000:]
    assert "Traceback" not in said
