"""The merged model: one that needs neither PEFT nor this project, worth what the trial was worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.core.manifest import verify_manifest
from sweeper.data.tokens import PaddingCollator
from sweeper.evaluation.token_loss import evaluate_examples, total
from sweeper.training.trial_runner import TransformersRunner
from tests.training.conftest import RunTiny

MERGED = ("artifacts.merged=true", "training.learning_rate=0.02")


def test_merged_model_is_worth_what_was_trained(run_tiny: RunTiny) -> None:
    """On an fp32 base merged/eval_loss is best/eval_loss, and transformers alone finds it."""
    runner = TransformersRunner(threads=1)
    outcome, _, folder = run_tiny("t", *MERGED, runner=runner)
    assert outcome.cause == "finished", outcome.message
    figures = outcome.metrics
    assert figures["merged/eval_loss"] == pytest.approx(figures["best/eval_loss"], abs=1e-4)
    assert figures["merged/eval_perplexity"] > 1
    verify_manifest(folder.merged)
    assert not (folder.merged / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder.merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder.merged)
    (data,) = runner._prepared.values()
    collator = PaddingCollator(tokenizer.pad_token_id)
    loss = total(evaluate_examples(model, data.validation.rows, collator, 4)).mean
    assert loss == pytest.approx(outcome.best_value, abs=1e-4)


def test_merging_into_a_quantized_base_is_judged_again(run_tiny: RunTiny, tiny_base: Path) -> None:
    """After QLoRA it is fp32 base + adapter, which is not what was trained: it has its own loss."""
    outcome, _, folder = run_tiny("t", *MERGED, "quantization=nf4")
    figures = outcome.metrics
    assert figures["merged/eval_loss"] != figures["best/eval_loss"]
    assert figures["merged/eval_loss"] == pytest.approx(figures["best/eval_loss"], abs=0.2)
    assert "quantization_config" not in json.loads((folder.merged / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(folder.merged).state_dict()
    unadapted = "model.embed_tokens.weight"
    assert torch.equal(base[unadapted], merged[unadapted])


def test_a_full_fine_tune_has_nothing_to_merge(run_tiny: RunTiny) -> None:
    """Its model/ is the one model already."""
    outcome, _, folder = run_tiny("t", "adapter=none", "artifacts.merged=true")
    assert outcome.cause == "finished", outcome.message
    assert not folder.merged.exists()
    assert "merged/eval_loss" not in outcome.metrics


def test_the_next_trial_starts_from_the_untouched_base(run_tiny: RunTiny) -> None:
    """A worker that has merged trains its next trial as if it had not."""
    runner = TransformersRunner(threads=1)
    _, first, _ = run_tiny("a", *MERGED, runner=runner)
    _, second, _ = run_tiny("b", "training.learning_rate=0.02", runner=runner)
    assert first == second
