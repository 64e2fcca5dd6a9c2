"""Other architectures than the embedded Llama train through the same path."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)

from sweeper.builtin.embedded import BASE_DIR
from sweeper.core.paths import TrialFolder
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.recorder import Recorder

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 512}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=2048, n_embd=64, n_layer=2, n_head=2, n_positions=512),
    "gpt_neox": GPTNeoXConfig(**SMALL, **HEADS),
    "phi": PhiConfig(**SMALL, **HEADS),
    "qwen3": Qwen3Config(**SMALL, **HEADS, num_key_value_heads=2, head_dim=32),
}


FAST = (("gpt2", "nf4"), ("qwen3", "none"))
"""Transposed weights under 4 bits, and plain ones in full precision."""


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in itertools.product(CONFIGS, ("nf4", "none"))
    ],
)
def test_architecture_trains_with_the_real_preset(
    name: str, quantization: str, rows_file: Path, tmp_path: Path
) -> None:
    """A randomly initialised model of the class, from a folder, learns with training=real's settings."""
    base = tmp_path / name
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(base)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(base)
    settings = make_settings(
        *(f"model.base_model={base}", f"data.train={rows_file}", f"quantization={quantization}"),
        *("training=real", "training.learning_rate=0.01", "training.max_steps=6"),
        *(
            "training.eval_steps=2",
            "training.activation_checkpointing=true",
            "training.warmup_ratio=0",
        ),
        "adapter.target_modules=attention",
    )
    recorder = Recorder()
    runner = TransformersRunner(threads=1)
    facts = runner.probe(settings.trial)
    outcome = runner.run(settings.trial, TrialFolder(tmp_path / "t"), {}, recorder)
    assert outcome.cause == "finished", outcome.message
    assert outcome.best_value is not None
    assert outcome.best_value < facts.base_value("eval/loss") - 0.05
    assert (tmp_path / "t" / "adapter" / "adapter_model.safetensors").exists()
