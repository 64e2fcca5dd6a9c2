"""What a trial counts, and how its log tells it."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from sweeper.evaluation.token_loss import LossSum, evaluate_examples, total
from sweeper.modeling.adapter import ParameterCount
from sweeper.training.outcome_metrics import best_figures, loss_figures, parameter_figures
from sweeper.training.trial_costs import TrialCosts
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny

STAGES = ("load", "data", "train", "eval", "save")


def test_a_stage_within_a_stage_pauses_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 s of training around 2 s of evaluation, which itself is left by an exception."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    costs = TrialCosts()
    with costs.stage("train"):
        now += 1.0
        with suppress(MemoryError), costs.stage("eval"):
            now += 2.0
            raise MemoryError
        now += 2.0
        assert costs.seconds("train") == 3.0
    now += 5.0
    metrics = costs.metrics()
    assert [metrics[f"cost/{name}_seconds"] for name in STAGES] == [0, 0, 3, 2, 0]
    assert metrics["cost/seconds"] == 10.0


def test_rates_count_neither_padding_nor_prompt_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches of 2 x 4 with 3 padded positions: 13 tokens, 5 targets, 4 samples in 2 s."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    costs = TrialCosts()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    other = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.zeros(2, 4, dtype=torch.long)
    with costs.stage("train"):
        costs.add_step(
            [{"input_ids": ids, "attention_mask": m} for m in (mask, other)],
            torch.tensor(5),
            devices=1,
        )
        now += 2.0
    metrics = costs.metrics()
    assert metrics["cost/tokens_per_second"] == 6.5
    assert metrics["cost/target_tokens_per_second"] == 2.5
    assert metrics["cost/samples_per_second"] == 2.0


def test_mean_train_loss_weighs_each_row_by_its_steps() -> None:
    """Losses 4 over steps 1-5, 3 over 6-10 and 2 over 11-12: (20 + 15 + 4) / 12."""
    rows = [
        *({"step": 5, "train/loss": 4.0}, {"step": 8, "eval/loss": 3.5}),
        *({"step": 10, "train/loss": 3.0}, {"step": 12, "train/loss": 2.0}),
    ]
    figures = loss_figures(rows)
    assert figures["train/mean_loss"] == pytest.approx(39 / 12)
    assert figures["train/final_loss"] == 2.0
    metrics = {"eval/loss": 3.5, "eval/rougeL": 0.2, "cost/generated_tokens_per_second": 9.0}
    assert best_figures(rows, metrics, best_step=8) == {
        "best/eval_loss": 3.5,
        "best/eval_rougeL": 0.2,
        "cost/generated_tokens_per_second": 9.0,
        "best/step": 8.0,
        "best/train_loss": 4.0,
        "best/eval_minus_train_loss": -0.5,
    }


def test_both_percentages_of_the_gpt2_report() -> None:
    """294,912 of 124,734,720: 0.2364 % of the total as reported, 0.2370 % of the base."""
    figures = parameter_figures(ParameterCount(total=124_734_720, trainable=294_912))
    assert round(figures["parameters/trainable_percent"], 4) == 0.2364
    assert round(figures["parameters/trainable_percent_of_base"], 4) == 0.2370


def test_log_holds_what_the_reports_logs_hold(run_tiny: RunTiny) -> None:
    """Duration, losses, samples, parameters, batch arithmetic, precision, stages, files: UTF-8."""
    outcome, losses, folder = run_tiny(
        "t", "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2"
    )
    text = folder.log_text.read_text(encoding="utf-8")
    figures = outcome.metrics
    rows = round(figures["data/train_rows"])
    left = rows - 16 * (math.ceil(rows / 16) - 1)
    for words in (
        "8 × 2 accumulation = 16 examples per step\n",
        f"{math.ceil(rows / 16)} per epoch, the last with {left} examples",
        "% of the total",
        "% of the base",
        *("Precision      float32: ", ". Trained weights are float32\n"),
        f"{figures['train/mean_loss']:.4f} mean over the run",
        f"Best eval/loss {min(loss for _, loss in losses):.4f}",
        "Stored         adapter/adapter_model.safetensors, ",
        "target tokens/s",
    ):
        assert words in text, words
    document = json.loads(folder.log_json.read_text(encoding="utf-8"))
    stored = {file["path"]: file["bytes"] for file in document["artifact"]}
    weights = folder.adapter / "adapter_model.safetensors"
    assert stored["adapter/adapter_model.safetensors"] == weights.stat().st_size
    assert document["outcome"]["metrics"]["train/mean_loss"] == figures["train/mean_loss"]
    assert document["facts"]["Checkpointing"] == "activations kept"


def test_stages_add_up_to_the_trial(run_tiny: RunTiny) -> None:
    """Nothing of a trial's seconds is lost between its stages but the writing of its log."""
    outcome, _, _ = run_tiny("t")
    metrics = outcome.metrics
    total = sum(metrics[f"cost/{name}_seconds"] for name in STAGES)
    assert all(metrics[f"cost/{name}_seconds"] > 0 for name in STAGES)
    assert total <= metrics["cost/seconds"]
    # On a busy machine the log alone may take a third of so short a trial.
    assert total > 0.5 * metrics["cost/seconds"]
    cpu = sum(metrics[f"cost/{name}_cpu_seconds"] for name in STAGES)
    assert 0 < cpu <= metrics["cost/cpu_seconds"]


def test_target_tokens_are_those_of_the_data(run_tiny: RunTiny) -> None:
    """One epoch sees every target token and every non-padding token of the training rows once."""
    runner = TransformersRunner(threads=1)
    outcome, _, _ = run_tiny("t", "training.max_steps=null", runner=runner)
    (data,) = runner._prepared.values()
    metrics = outcome.metrics
    seconds = metrics["cost/train_seconds"]
    tokens = sum(len(row["input_ids"]) for row in data.train.rows)
    assert metrics["cost/tokens_per_second"] * seconds == pytest.approx(tokens)
    targets = metrics["cost/target_tokens_per_second"] * seconds
    assert targets == pytest.approx(data.train.target_tokens)
    assert metrics["cost/samples_per_second"] * seconds == pytest.approx(len(data.train.rows))


def test_last_steps_are_logged_and_the_moving_average_written(run_tiny: RunTiny) -> None:
    """logging_steps=4 in 6 steps logs step 6 too; every evaluation carries its moving average."""
    outcome, losses, folder = run_tiny(
        "t", "training.logging_steps=4", "training.moving_average_window=2"
    )
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [4, 6]
    averages = [row["eval/loss_moving_average"] for row in rows if "eval/loss" in row]
    values = [loss for _, loss in losses]
    expected = [values[0], (values[0] + values[1]) / 2, (values[1] + values[2]) / 2]
    assert averages == pytest.approx(expected)
    assert outcome.metrics["train/final_loss"] == rows[-2]["train/loss"]


def test_best_between_two_periodic_checkpoints_is_what_is_kept(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving only at step 6, the weights of step 4, judged best, are stored all the same."""
    real: list[float] = []

    def scripted(model: Any, rows: Any, *more: Any) -> list[LossSum]:
        real.append(total(evaluate_examples(model, rows, *more)).mean)
        return [LossSum([3.0, 2.0, 4.0][len(real) - 1], 1, 1)]

    monkeypatch.setattr("sweeper.evaluation.judge.evaluate_examples", scripted)
    full = ("adapter=none", "training.learning_rate=0.01")
    outcome, _, folder = run_tiny("t", *full, "training.save_steps=6")
    assert (outcome.best_value, outcome.best_step) == (2.0, 4)
    data = json.loads(folder.log_json.read_text())["settings"]["data"]
    settings = make_settings(
        *(f"model.base_model={folder.model}", "quantization=none", f"data.train={data['train']}")
    )
    monkeypatch.undo()
    stored = TransformersRunner(threads=1).probe(settings.trial).base_value("eval/loss")
    assert stored == pytest.approx(real[1], abs=1e-5)
    assert abs(real[1] - real[2]) > 1e-3


def test_divergence_against_the_first_loss_ends_a_trial(run_tiny: RunTiny) -> None:
    """A rate that drives the loss far above its start and keeps it there is diverged, with why."""
    outcome, _, _ = run_tiny(
        *("t", "adapter=none", "training.learning_rate=1.0", "training.warmup_ratio=0"),
        *("training.max_steps=20", "training.divergence_threshold=1.5", "training.eval_delay=0"),
    )
    assert outcome.cause == "diverged"
    assert "1.5 times the first loss" in (outcome.message or "")
    assert outcome.metrics["cost/train_seconds"] > 0


def test_fp16_without_a_gpu_is_refused_in_one_sentence(run_tiny: RunTiny) -> None:
    """torch scales fp16's gradients on GPUs only."""
    outcome, _, _ = run_tiny("t", "model.dtype=float16")
    assert outcome.cause == "refused"
    assert "model.dtype=float16" in (outcome.message or "")
    assert "bfloat16" in (outcome.message or "")
