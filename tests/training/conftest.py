"""Trials of a few steps on a model small enough that the machinery is all they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.recorder import Recorder

RunTiny = Callable[..., tuple[Outcome, list[tuple[int, float]], TrialFolder]]


@pytest.fixture(scope="module")
def warm_runner() -> TransformersRunner:
    """The runner of a module's trials, warm from the second one on as a worker's is."""
    return TransformersRunner(threads=1)


@pytest.fixture(scope="module")
def run_tiny_at(tiny_base: Path, rows_file: Path, warm_runner: TransformersRunner) -> RunTiny:
    """Run a trial on `tiny_base` in a given folder: (outcome, evaluations, folder)."""

    def run(
        path: Path,
        *overrides: str,
        runner: TransformersRunner | None = None,
        observer: Recorder | None = None,
    ) -> tuple[Outcome, list[tuple[int, float]], TrialFolder]:
        settings = make_settings(
            *(f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none"),
            *("training.max_steps=6", "training.eval_steps=2", "training.logging_steps=1"),
            *overrides,
        ).trial
        recorder, folder = observer or Recorder(), TrialFolder(path)
        outcome = (runner or warm_runner).run(settings, folder, {}, recorder)
        return outcome, recorder.losses, folder

    return run


@pytest.fixture
def run_tiny(run_tiny_at: RunTiny, tmp_path: Path) -> RunTiny:
    """Run a trial on `tiny_base` in a folder of the test: (outcome, evaluations, folder)."""
    return lambda name, *overrides, **options: run_tiny_at(tmp_path / name, *overrides, **options)
