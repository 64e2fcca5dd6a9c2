"""What several tests need: settings from overrides, a small data file, the program as a subprocess."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import pytest

# before torch is imported anywhere: two test processes share two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
# tokens and stand-ins that the tests build are neither taken from the user's cache nor left in it
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sweeper-tests-")

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, validate

# how long an example takes depends on what else the machine does
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

Program = Callable[..., subprocess.CompletedProcess[str]]


def make_settings(*overrides: str) -> RunSettings:
    """Validated settings of the default config with overrides."""
    return validate(RunSettings, compose(overrides).config)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty Alpaca rows that a tiny model can learn something from."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "instruction": "Write a one-line docstring.",
            "input": f"def add_{number}(a, b)",
            "output": f"Return the sum of a and b plus {number}.",
        }
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Llama of two layers of 32, with the embedded base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_base")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 512, "vocab_size": 2048}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without a run, made once: its tables take seconds."""
    from sweeper.tracking.tracking_server import TrackingServer

    root = tmp_path_factory.mktemp("store")
    TrackingServer(None, root).client()
    return root / "mlflow.db"


def run_program(
    arguments: Sequence[str], cwd: Path, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """`python -m sweeper` as a user runs it, in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sweeper", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Run the program in the test's own folder."""
    return lambda *arguments, timeout_s=240: run_program(arguments, tmp_path, timeout_s)
