"""Every report's experiment trains here, on its stand-in, through the real loaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.config.compose import compose, with_auto_groups
from sweeper.config.settings import RunSettings, validate
from sweeper.core.paths import TrialFolder
from sweeper.training.trial_runner import TransformersRunner
from tests.training.recorder import Recorder

EXPERIMENTS = {
    # experiment -> what the trial's folder must hold besides the adapter
    "qwen3_alpaca": ("adapter/vocab.json", "adapter/merges.txt", "samples.md"),
    "qwen2_5_instruct": ("adapter.zip", "adapter/adapter_config.json"),
    "llama3_2_finetome": ("samples.json", "adapter/chat_template.jinja"),
    "finetome_mixture": ("data_card.md",),
    "llama3_ranks": ("training_log.json",),
    "gpt2_book": ("training_log.txt",),
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS))
def test_experiment_trains_on_its_stand_in(experiment: str, tmp_path: Path) -> None:
    """It ends with a kept checkpoint that is better than the untuned base, and with its artifacts."""
    overrides = with_auto_groups([f"+experiment={experiment}", "+stand_in=tiny"])
    settings = validate(RunSettings, compose(overrides).config).trial
    runner, folder = TransformersRunner(threads=1), TrialFolder(tmp_path / "trial")
    facts = runner.probe(settings)
    outcome = runner.run(settings, folder, {}, Recorder())
    assert outcome.cause == "finished", outcome.message
    assert outcome.best_value is not None
    assert outcome.best_value < facts.base_value("eval/loss")
    for name in (*EXPERIMENTS[experiment], "adapter/adapter_model.safetensors"):
        assert (folder.path / name).exists(), name
