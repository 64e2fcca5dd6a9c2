"""Trials of a few steps on a model small enough that the machinery is all they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sweeper.embedded import BASE_DIR
from sweeper.folders import TrialFolder
from sweeper.outcome import Outcome
from sweeper.training.runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.recorder import Recorder

RunTiny = Callable[..., tuple[Outcome, list[tuple[int, float]], TrialFolder]]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Llama of two layers of 32, with the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_base")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 512, "vocab_size": 2048}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)
    return folder


@pytest.fixture
def run_tiny(tiny_base: Path, rows_file: Path, tmp_path: Path) -> RunTiny:
    """Run a trial on `tiny_base` in a folder of the test: (outcome, evaluations, folder)."""

    def run(
        name: str,
        *overrides: str,
        runner: TransformersRunner | None = None,
        observer: Recorder | None = None,
    ) -> tuple[Outcome, list[tuple[int, float]], TrialFolder]:
        settings = make_settings(
            *(f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none"),
            *("training.max_steps=6", "training.eval_steps=2", "training.logging_steps=1"),
            *overrides,
        ).trial
        recorder, folder = observer or Recorder(), TrialFolder(tmp_path / name)
        outcome = (runner or TransformersRunner(threads=1)).run(settings, folder, {}, recorder)
        return outcome, recorder.losses, folder

    return run
