"""A canary in every place a secret may come from; it must come out nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest
from pydantic import BaseModel

from sweeper.config.settings import RunSettings
from tests.conftest import run_in_process

CANARY = "c4n4ry0f7h3d4y"
STUDY = (
    *("+experiment=lr_rank_sweep", "workers=fake", "~hydra.sweeper.arms.full"),
    *("hydra.sweeper.n_trials=3", "workers.fake.step_seconds=0.02", "pruner=none"),
)


def _environment(tmp_path: Path) -> dict[str, str]:
    """A token, a password, and URLs that are secrets as a whole."""
    (tmp_path / CANARY).mkdir()
    return {
        **os.environ,
        "HF_TOKEN": f"hf_{CANARY}",
        "MLFLOW_TRACKING_PASSWORD": CANARY,
        "SWEEPER_STORAGE": f"sqlite:///{tmp_path / CANARY / 'study.db'}",
    }


@pytest.mark.parametrize("tracking", ["none", pytest.param("mlflow", marks=pytest.mark.slow)])
def test_a_secret_given_by_reference_comes_out_nowhere(tmp_path: Path, tracking: str) -> None:
    """Not in a file, not in MLflow's store, not on the terminal, not in the process list."""
    command = [
        *(sys.executable, "-m", "sweeper", *STUDY, f"tracking={tracking}"),
        *(
            "hydra.sweeper.storage=${oc.env:SWEEPER_STORAGE}",
            "++workers.fake.plan={1: crash}",
            "-m",
        ),
    ]
    process = subprocess.Popen(
        command,
        *(-1, None, None, subprocess.PIPE, subprocess.STDOUT),
        cwd=tmp_path,
        env=_environment(tmp_path),
        text=True,
    )
    seen: list[str] = []
    while process.poll() is None:
        family = [psutil.Process(process.pid)] if psutil.pid_exists(process.pid) else []
        for member in [*family, *(child for p in family for child in p.children(recursive=True))]:
            try:
                seen.extend(member.cmdline())
            except psutil.Error:
                continue
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    output = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, output
    assert (tmp_path / CANARY / "study.db").exists(), "the reference was used"
    assert any("oc.env:SWEEPER_STORAGE" in word for word in seen), "the process list was read"
    assert not [word for word in seen if CANARY in word]
    assert CANARY not in output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    held = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert held == []


PIECE = "c4n4ry0f"
AWKWARD = f"""{PIECE}'7h3"d4y&x/<y>"""
"""Characters that JSON, YAML, HTML and URLs each spell in their own way."""
BY_REFERENCE = "${oc.env:SWEEPER_CANARY}"
TEXT_SETTINGS = (
    *(f"{key}={BY_REFERENCE}" for key in ("model.base_model", "model.revision", "data.group_by")),
    *(f"{key}={BY_REFERENCE}" for key in ("data.validation", "data.test", "data.balance_by")),
    *(f"{key}={BY_REFERENCE}" for key in ("data.template", "data.order_by")),
    *(f"{key}={BY_REFERENCE}" for key in ("stand_in.base_model", "stand_in.train")),
    f"data.train=[{{path: 'https://h/rows.jsonl?token={BY_REFERENCE}', revision: '{BY_REFERENCE}'}}]",
    f"evaluation.prompts=[{{category: '{BY_REFERENCE}', prompt: 'Say {BY_REFERENCE}'}}]",
    f"data.columns={{instruction: '{BY_REFERENCE}'}}",
    f"evaluation.general_text.source={BY_REFERENCE}",
    f"adapter.modules_to_save=['{BY_REFERENCE}']",
    f"data.cleaning.completion_pattern='{BY_REFERENCE}'",
    f"data.ignore_columns=['{BY_REFERENCE}']",
    f"++data.chat_template_kwargs={{note: '{BY_REFERENCE}'}}",
    f"stand_in.validation={BY_REFERENCE}",
    f"++made_by={{rows: '{BY_REFERENCE}'}}",
)
NO_FREE_TEXT = {
    **dict.fromkeys(
        ("output_dir", "tracking.uri"), "a place, whose name is on the disk or the network"
    ),
    **dict.fromkeys(("objective.metric", "objective.pruning_metric"), "the name of a metric"),
    **dict.fromkeys(("evaluation.metrics", "evaluation.metric_modules"), "names of Python modules"),
    **dict.fromkeys(
        (
            *("space.learning_rate", "space.r", "space.full_learning_rate"),
            *("space.alpha_over_r", "space.shared_params"),
        ),
        "a search space",
    ),
    **dict.fromkeys(
        ("space.priors", "space.full_priors", "workers.fake.finalists"),
        "checked against known values",
    ),
    **dict.fromkeys(
        ("adapter.target_modules", "adapter.layers_to_transform"), "checked by its form"
    ),
    **dict.fromkeys(("adapter.init_lora_weights", "adapter.rank_pattern"), "checked by its form"),
    **dict.fromkeys(
        ("adapter.alpha_pattern", "workers.address", "training.save_steps"), "checked by its form"
    ),
}
"""Settings that take a text, but not any text, and why no secret stands there."""


def _text_settings(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield each setting whose type admits a string."""
    for name, setting in section.model_fields.items():
        inner = [setting.annotation, *get_args(setting.annotation)]
        parts = [each for each in inner if isinstance(each, type) and issubclass(each, BaseModel)]
        for part in parts:
            yield from _text_settings(part, f"{prefix}{name}.")
        if not parts and re.search(r"\bstr\b|Any\b", str(setting.annotation)):
            yield prefix + name


def test_every_setting_that_takes_a_text_has_its_canary() -> None:
    """A setting that is added stands in TEXT_SETTINGS, or in NO_FREE_TEXT with its reason."""
    given = {text.lstrip("+").partition("=")[0] for text in TEXT_SETTINGS}
    found = {
        re.sub(r"^(evaluation\.prompts)\..*", r"\1", key) for key in _text_settings(RunSettings)
    }
    assert found - {"data.train"} - given == set(NO_FREE_TEXT)
    assert not given & set(NO_FREE_TEXT)


@pytest.mark.parametrize("tracking", ["none", pytest.param("mlflow", marks=pytest.mark.slow)])
def test_what_a_setting_takes_from_the_environment_is_written_as_the_reference(
    tmp_path: Path, tracking: str
) -> None:
    """In every setting that takes a text: no file, database, page, name or line holds the value."""
    command = [
        *(sys.executable, "-m", "sweeper", *STUDY, *TEXT_SETTINGS, f"tracking={tracking}"),
        *("++workers.fake.plan={1: crash}", "-m"),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "SWEEPER_CANARY": AWKWARD},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert PIECE not in done.stdout + done.stderr
    paths = list(tmp_path.rglob("*"))
    assert [path for path in paths if PIECE in path.name] == []
    files = [path for path in paths if path.is_file()]
    assert [path for path in files if PIECE.encode() in path.read_bytes()] == []
    (config,) = tmp_path.glob("outputs/*/lora/trial_0000/config.yaml")
    assert BY_REFERENCE in config.read_text(), "the reference stands where the value was used"


def test_a_literal_password_on_the_command_line_is_refused(tmp_path: Path) -> None:
    """Exit 2, the key and the way out; the password itself is not repeated, and nothing is written."""
    override = f"hydra.sweeper.storage=postgresql+psycopg://me:{CANARY}@db/optuna"
    result = run_in_process([*STUDY, override, "-m"], tmp_path)
    assert result.returncode == 2
    assert "'hydra.sweeper.storage=${oc.env:NAME}'" in result.stderr
    assert CANARY not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_database_names_no_password(tmp_path: Path) -> None:
    """A server that does not answer: one message, exit 1, no URL with its password."""
    url = f"postgresql+psycopg://me:{CANARY}@127.0.0.1:9/optuna"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "sweeper", *STUDY, "tracking=none"),
            *("hydra.sweeper.storage=${oc.env:SWEEPER_STORAGE}", "-m"),
        ],
        cwd=tmp_path,
        env={**os.environ, "SWEEPER_STORAGE": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "hydra.sweeper.storage" in result.stderr
    assert "Traceback" not in result.stderr
    assert CANARY not in result.stdout + result.stderr
