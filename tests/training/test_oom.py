"""Out of memory inside a trial: smaller micro-batches, the same computation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import DoesNotFit
from sweeper.evaluation.generation import generate
from sweeper.evaluation.token_loss import LossSum, evaluate_examples, target_nll
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.batches import count_rows
from tests.training.conftest import RunTiny

BATCH = ("training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2")
FULL = ("adapter=none", "training.learning_rate=1e-3")
LORA = ("adapter.lora_dropout=0.0", "training.learning_rate=0.02")
Nll = Callable[[torch.nn.Module, Mapping[str, torch.Tensor], int | None], torch.Tensor]


def _with_room_for(examples: int, calls_before: int = 0) -> Nll:
    """A loss that runs out of memory on more than `examples` at once, from some call on."""
    calls = 0

    def limited(
        model: torch.nn.Module, batch: Mapping[str, torch.Tensor], chunk_size: int | None
    ) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > calls_before and count_rows(batch) > examples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return target_nll(model, batch, chunk_size)

    return limited


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_losses_are_those_of_the_smaller_micro_batch_from_the_start(
    method: tuple[str, ...], run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 x 2 that fits 2 at a time ends as 2 x 8, and as if nothing had happened."""
    _, whole, _ = run_tiny("whole", *BATCH, *method)
    small = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=8")
    _, direct, _ = run_tiny("direct", *small, *method)
    monkeypatch.setattr("sweeper.training.trainer.target_nll", _with_room_for(2))
    outcome, retried, folder = run_tiny("retried", *BATCH, *method)
    assert outcome.cause == "finished"
    assert outcome.metrics["cost/oom_retries"] == 2
    assert outcome.metrics["training/micro_batch"] == 2
    assert outcome.metrics["training/effective_batch"] == 16
    assert retried == direct
    assert retried == [pytest.approx(item, abs=2e-4) for item in whole]
    text = folder.log_text.read_text(encoding="utf-8")
    assert "2 × 8 accumulation = 16 examples per step (after running out of memory 2 times)" in text


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_a_late_failure_continues_from_the_checkpoint(
    method: tuple[str, ...], run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in step 5: steps 1 to 4 are not trained again, and the losses are the same."""
    _, whole, _ = run_tiny("whole", *BATCH, *method)
    monkeypatch.setattr("sweeper.training.trainer.target_nll", _with_room_for(4, calls_before=8))
    outcome, evaluations, folder = run_tiny("late", *BATCH, *method)
    assert outcome.metrics["cost/oom_retries"] == 1
    assert [step for step, _ in evaluations] == [2, 4, 6]
    assert evaluations == [pytest.approx(item, abs=2e-4) for item in whole]
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_below_one_example_it_is_the_outcome(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8, 4, 2, 1 examples at once do not fit: cause oom, after three retries."""
    monkeypatch.setattr("sweeper.training.trainer.target_nll", _with_room_for(0))
    outcome, evaluations, _ = run_tiny("t", *BATCH)
    assert (outcome.cause, outcome.steps, evaluations) == ("oom", 0, [])
    assert outcome.metrics["cost/oom_retries"] == 3
    assert "out of memory" in (outcome.message or "")


def test_evaluation_halves_its_own_batch(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judging in smaller batches gives the same loss, so training is left alone."""
    _, whole, _ = run_tiny("whole", *BATCH)

    def limited(model: Any, rows: Any, collator: Any, size: int, *more: Any) -> list[LossSum]:
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate_examples(model, rows, collator, size, *more)

    monkeypatch.setattr("sweeper.evaluation.judge.evaluate_examples", limited)
    outcome, evaluations, _ = run_tiny("t", *BATCH)
    assert evaluations == [pytest.approx(item, abs=1e-5) for item in whole]
    assert outcome.metrics["training/micro_batch"] == 8
    assert outcome.metrics["cost/oom_retries"] == 2


def test_another_runtime_error_is_not_retried(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the code stays one."""

    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("sweeper.training.trainer.target_nll", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run_tiny("t", *BATCH)


def test_the_smallest_evaluation_leaves_the_training_batch_alone(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation of one example that does not fit is the outcome: no smaller training helps."""

    def full(*_: object) -> list[LossSum]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("sweeper.evaluation.judge.evaluate_examples", full)
    outcome, _, _ = run_tiny("t", *BATCH, "evaluation.per_device_eval_batch_size=2")
    assert outcome.cause == "oom"
    assert outcome.metrics["training/micro_batch"] == 8


@pytest.mark.parametrize(("room", "cause", "retries"), [(2, "finished", 2), (0, "oom", 3)])
def test_answers_to_prompts_halve_their_own_batch(
    room: int, cause: str, retries: int, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8, 4, 2 prompts at a time, while the training keeps its micro-batch."""

    def limited(model: Any, tokenizer: Any, prompts: Any, new: int, size: int, *more: Any) -> Any:
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(model, tokenizer, prompts, new, size, *more)

    monkeypatch.setattr("sweeper.training.prompt_answers.generate", limited)
    asked = "evaluation.prompts=[{category: a, prompt: 'Write a haiku about the ocean.'}]"
    short = ("evaluation.generation.batch_size=8", "evaluation.generation.max_new_tokens=2")
    outcome, _, _ = run_tiny("t", *BATCH, asked, *short)
    assert outcome.cause == cause
    assert outcome.metrics["cost/oom_retries"] == retries
    if room:
        assert outcome.metrics["training/micro_batch"] == 8


PROBED = {
    "the base": "sweeper.training.trial_runner.load_base",
    "its evaluation": "sweeper.evaluation.judge.evaluate_examples",
}


@pytest.mark.parametrize("stage", PROBED)
def test_a_probe_that_runs_out_of_memory_does_not_fit(
    stage: str, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arm is left out with its sizes and the error, and the worker's process is replaced."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(PROBED[stage], full)
    runner = TransformersRunner(threads=1)
    with pytest.raises(DoesNotFit, match=r"memory ran out for the base .* Tried to allocate 20"):
        runner.probe(_settings(tiny_base, rows_file))
    assert runner.worn_out


def test_a_probe_halves_the_batch_of_its_evaluation(
    tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untuned base is judged in batches that fit, as every later model is."""

    def limited(model: Any, rows: Any, collator: Any, size: int, *more: Any) -> list[LossSum]:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate_examples(model, rows, collator, size, *more)

    monkeypatch.setattr("sweeper.evaluation.judge.evaluate_examples", limited)
    facts = TransformersRunner(threads=1).probe(_settings(tiny_base, rows_file))
    assert facts.base_metrics["eval/loss"] > 0


def test_a_check_that_runs_out_of_memory_is_a_refusal(
    tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial whose bare description fills the memory is too large, and no error in the code."""

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . can't allocate memory")

    monkeypatch.setattr("sweeper.modeling.trial_check.ModelChecks.size", full)
    with pytest.raises(DoesNotFit, match="memory ran out for the description"):
        TransformersRunner(threads=1).check(_settings(tiny_base, rows_file))


def _settings(base: Path, rows: Path) -> TrialSettings:
    fixed = (f"model.base_model={base}", f"data.train={rows}", "quantization=none")
    return make_settings(*fixed, "evaluation.per_device_eval_batch_size=8").trial
