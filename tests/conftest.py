"""What several tests need: settings from overrides, a small data file, the program as a subprocess."""

from __future__ import annotations

import atexit
import copy
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# before torch is imported anywhere: two test processes share two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
# tokens and stand-ins that the tests build are neither taken from the user's cache nor left in it
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sweeper-tests-")

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeper.__main__ import main
from sweeper.builtin.embedded import BASE_DIR
from sweeper.cli.verbs import VERBS
from sweeper.config.compose import compose
from sweeper.config.settings import RunSettings, validate
from sweeper.core.errors import ConfigError
from sweeper.core.garbage import uncollected

# how long an example takes depends on what else the machine does
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

PLAIN_VALUE = re.compile(r"(?!hydra\.)[a-z_]+(\.\w+)+=")
"""An override of one key's value: no group, nothing added, nothing deleted, not the study's."""

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all test modules, and with them torch and MLflow, without garbage collection."""
    with uncollected():
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Keep what the imports left out of the garbage collector's walks."""
    # transformers and the runner collect garbage in every trial; over the million objects of
    # torch, transformers and MLflow one walk takes longer than the trial's training
    gc.collect()
    gc.freeze()


def make_settings(*overrides: str) -> RunSettings:
    """Validated settings of the default config with overrides."""
    return validate(RunSettings, composed_config(*overrides))


def composed_config(*overrides: str) -> dict[str, Any]:
    """Return what composing with overrides gives, in a twentieth of its time for plain values.

    Groups are composed, once for each choice; then plain values are set as Hydra sets them
    (tests/test_settings_of_tests.py compares the two ways).
    """
    plain = [text for text in overrides if PLAIN_VALUE.match(text)]
    rest = [text for text in overrides if text not in plain]
    changed = copy.deepcopy(compose(rest).unresolved)
    OmegaConf.set_struct(changed, True)
    try:
        for override in OverridesParser.create().parse_overrides(plain):
            OmegaConf.update(changed, override.key_or_group, override.value(), merge=True)
        config = OmegaConf.to_container(changed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException):
        return compose(overrides).config  # refuses them, in the product's own words
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty Alpaca rows that a tiny model can learn something from; no test writes to them."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
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


def run_in_process(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Do as `run_program` without its seconds of imports: for verbs, and for what is refused."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["sweeper", *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    # Hydra's application changes logging and more: what trains needs a process of its own
    assert arguments[0] in VERBS or code == ConfigError.exit_code, output.getvalue()
    words = output.getvalue(), errors.getvalue()
    return subprocess.CompletedProcess(list(arguments), code, *words)


@pytest.fixture
def in_process(tmp_path: Path) -> Program:
    """Run a verb of the program in this process, in the test's own folder."""
    return lambda *arguments: run_in_process(arguments, tmp_path)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Run the program in the test's own folder."""
    return lambda *arguments, timeout_s=240: run_program(arguments, tmp_path, timeout_s)
