"""Trials without padding are the trials that padded batches gave."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from sweeper.core.paths import TrialFolder
from sweeper.modeling import base_model
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

ACCUMULATED = ("training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=3")
TRIALS: dict[str, tuple[str, ...]] = {
    "accumulation": (*ACCUMULATED, "adapter.lora_dropout=0"),
    "recomputed": ("training.activation_checkpointing=true", "adapter.lora_dropout=0"),
    "dora": ("adapter.use_dora=true", "adapter.lora_dropout=0"),
    "whole modules": ("adapter.modules_to_save=[lm_head]", "adapter.lora_dropout=0"),
    "packing": ("data.packing=true", "data.max_length=128", "adapter.lora_dropout=0"),
    "full": ("adapter=none",),
    "a partial last batch": (
        *("training.per_device_train_batch_size=5", "training.gradient_accumulation_steps=3"),
        *("training.max_steps=null", "training.num_train_epochs=2", "training.eval_steps=1"),
        "adapter.lora_dropout=0",
    ),
    "early stopping": (
        *("training.max_steps=20", "training.early_stopping_patience=2"),
        # Each evaluation is better, but not by as much as counts
        *("training.early_stopping_threshold=1", "training.early_stopping_min_fraction=0.1"),
        "adapter.lora_dropout=0",
    ),
}


def _pad_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "padding_obstacle", lambda model: "this test pads")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "accumulation" else pytest.mark.slow) for n in TRIALS],
)
def test_evaluations_are_those_of_the_padded_trial(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every evaluation to 1e-5, and the same best step, for each way to train."""
    outcome, losses, folder = run_tiny("free", *TRIALS[name])
    assert _fact(folder) == "without padding"
    _pad_everything(monkeypatch)
    expected, padded, other = run_tiny("padded", *TRIALS[name], runner=TransformersRunner(1))
    assert _fact(other) == "padded: this test pads"
    assert (outcome.cause, outcome.best_step) == (expected.cause, expected.best_step)
    assert outcome.cause == ("early_stopped" if name == "early stopping" else "finished")
    assert [step for step, _ in losses] == [step for step, _ in padded]
    assert [value for _, value in losses] == pytest.approx([v for _, v in padded], abs=1e-5)
    if name != "packing":  # without padding, its samples are examples, not packs
        rates = ("cost/samples_per_second", "cost/tokens_per_second")
        found, known = ([one.metrics[rate] for rate in rates] for one in (outcome, expected))
        assert found[0] / found[1] == pytest.approx(known[0] / known[1], rel=1e-6)


@pytest.mark.slow
def test_padded_trial_continues_without_padding(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of padded batches is continued without, with the losses of the whole trial."""
    options = ("adapter.lora_dropout=0", *ACCUMULATED)
    _, whole, _ = run_tiny("whole", *options)
    with monkeypatch.context() as patch:
        _pad_everything(patch)
        runner, observer = TransformersRunner(1), _Cancelled(stop_after=1)
        stopped, begun, _ = run_tiny("t", *options, runner=runner, observer=observer)
    assert stopped.cause == "cancelled"
    _, rest, folder = run_tiny("t", *options)
    assert _fact(folder) == "without padding"
    assert [v for _, v in begun + rest] == pytest.approx([v for _, v in whole], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter.lora_dropout=0", "adapter=none"], ids=["lora", "full"])
def test_trial_that_was_killed_ends_as_the_padded_trial(
    run_tiny: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
) -> None:
    """kill -9 in an epoch: the rest has the losses of the padded trial that was never killed."""
    options = (method, *ACCUMULATED)
    attempt = get_context("spawn").Process(
        target=_run_until_killed,
        args=(tmp_path / "t", f"model.base_model={tiny_base}", f"data.train={rows_file}", *options),
    )
    attempt.start()
    attempt.join(200)
    assert attempt.exitcode == -signal.SIGKILL
    outcome, rest, folder = run_tiny("t", *options)
    assert _fact(folder) == "without padding"
    assert [step for step, _ in rest] == [4, 6]
    _pad_everything(monkeypatch)
    expected, padded, _ = run_tiny("padded", *options, runner=TransformersRunner(1))
    assert [value for _, value in rest] == pytest.approx([v for _, v in padded[1:]], abs=1e-5)
    assert (outcome.cause, outcome.best_step) == (expected.cause, expected.best_step)


class _KillsItself(Recorder):
    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        super().evaluated(step, total_steps, value)
        if len(self.losses) == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _run_until_killed(folder: Path, *overrides: str) -> None:
    settings = make_settings(
        *("quantization=none", "training.max_steps=6", "training.eval_steps=2", *overrides),
        "training.logging_steps=1",
    ).trial
    TransformersRunner(1).run(settings, TrialFolder(folder), {}, _KillsItself())


class _Cancelled(Recorder):
    def stop_cause(self) -> str | None:  # type: ignore[override]
        return "cancelled" if super().stop_cause() else None


def test_probe_says_once_why_batches_are_padded(tiny_base: Path, rows_file: Path) -> None:
    """The facts of an arm name the reason, and none where batches have no padding."""
    named = (f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none")
    runner = TransformersRunner(threads=1)
    assert runner.probe(make_settings(*named).trial).padded_because is None
    facts = runner.probe(make_settings(*named, "model.attn_implementation=eager").trial)
    assert facts.padded_because == "its attention is eager, not sdpa"


def _fact(folder: TrialFolder) -> str:
    return str(json.loads(folder.log_json.read_text())["facts"]["Batches"])
