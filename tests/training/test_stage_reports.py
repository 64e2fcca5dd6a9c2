"""A real worker names each stage of its work that may take long."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.commands.step_timing import StepClock
from sweeper.core.paths import TrialFolder
from sweeper.core.stage_words import StageListener, heard_by
from sweeper.training import trial_callback
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings


@pytest.mark.slow
def test_a_probe_a_trial_and_a_judgement_name_their_stages(
    rows_file: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, data, judging with its rows, training with its steps, storing: none is silent."""
    # nothing from other tests' token cache, and a word for every step, however fast it is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial_callback, "PROGRESS_SECONDS", 0.0)
    names = (f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none")
    schedule = ("training.max_steps=8", "training.eval_steps=4", "training.logging_steps=1")
    settings = make_settings(*names, *schedule).trial
    clock = iter(range(0, 10**6, 10))
    said: list[str] = []
    runner = TransformersRunner(threads=2)
    with heard_by(StageListener(said.append, lambda: next(clock))):
        runner.probe(settings)
        probed = len(said)
        runner.run(settings, TrialFolder(tmp_path / "trial"), {}, StepClock())
    probe, trial = "\n".join(said[:probed]), "\n".join(said[probed:])
    for words in ("loading the base model", "reading and tokenizing the data: ", "base: "):
        assert words in probe
    for words in ("step 8 of 8, loss ", "judging a sample of the validation split: ", "storing"):
        assert words in trial
