"""What a GPU has room for decides how a trial is batched; on a CPU nothing is estimated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sweeper.core.errors import DoesNotFit
from sweeper.core.outcome import TrialSize
from sweeper.modeling.base_model import load_base
from sweeper.modeling.hardware import DeviceReport
from sweeper.training.memory_budget import MemoryBudget
from sweeper.training.micro_batch import smallest_form
from sweeper.training.prepared_data import prepare
from tests.conftest import make_settings


def test_estimate_is_held_against_the_free_memory_of_a_gpu(
    tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial fits below 80 % of what is free, does not above, and is not judged on a CPU."""
    overrides = (f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none")
    settings = make_settings(*overrides).trial
    prepared = prepare(
        settings.data, load_base(settings.model, settings.quantization, trained=False)
    )
    room = MemoryBudget()
    assert room.fits(prepared)(settings) is None

    monkeypatch.setattr("sweeper.training.memory_budget.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("sweeper.modeling.memory_estimate.choose_dtype", _fp32)
    for free, fits in ((1e6, True), (1.0, False)):
        report = DeviceReport("GPU", "sm_80", True, 2 * free, free)
        monkeypatch.setattr(
            "sweeper.training.memory_budget.device_report", lambda _, found=report: found
        )
        assert room.fits(prepared)(settings) is fits
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 2**40)
    assert room.fits(prepared)(settings), "what this process holds is the trial's as well"


@pytest.mark.slow
def test_micro_batches_without_padding_are_estimated_by_their_tokens(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows of which one is long need less than eight long ones, whose memory padding takes."""
    path = tmp_path / "rows.jsonl"
    words = ["word " * (200 if number == 7 else 2) for number in range(40)]
    rows = [{"instruction": "Count.", "input": text, "output": "many"} for text in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (f"model.base_model={tiny_base}", f"data.train={path}", "quantization=none")
    settings = make_settings(*overrides, "training.per_device_train_batch_size=8").trial
    base = load_base(settings.model, settings.quantization, trained=False)
    prepared = prepare(settings.data, base)
    monkeypatch.setattr("sweeper.training.memory_budget.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("sweeper.modeling.memory_estimate.choose_dtype", _fp32)
    budget = MemoryBudget()
    padded = budget.estimate_mib(settings, prepared)
    free = budget.estimate_mib(settings, prepared, padding_free=True)
    one = budget.estimate_mib(smallest_form(settings), prepared, padding_free=True)
    assert padded is not None
    assert free is not None
    assert one is not None
    assert one < free < padded


@pytest.mark.parametrize(
    ("on", "total", "held", "known", "message"),
    [
        ("cpu", 100.0, 99.0, True, None),
        ("cpu", 100.0, 101.0, True, "states need 101 MiB, but the device has 100 MiB"),
        ("cuda", 612.0, 99.0, False, None),  # the CUDA context takes 512
        ("cuda", 612.0, 101.0, False, "states need 101 MiB, but the device has 100 MiB"),
        ("cuda", 612.0, 1.0, True, None),
        ("cuda", 512.5, 0.1, True, "activations of one row need 1 MiB"),
        ("cuda", 512.5, 0.1, False, None),  # its data are not known yet
    ],
)
def test_a_trial_larger_than_the_device_is_refused(
    tiny_base: Path,
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    on: str,
    total: float,
    held: float,
    known: bool,
    message: str | None,
) -> None:
    """In its most smallest_form form, against all of the device's memory, whatever is free of it."""
    overrides = (f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none")
    settings = make_settings(*overrides, "training.per_device_train_batch_size=8").trial
    prepared = prepare(
        settings.data, load_base(settings.model, settings.quantization, trained=False)
    )
    report = DeviceReport("device", "", bf16=True, total_mib=total, free_mib=0.0)
    monkeypatch.setattr("sweeper.training.memory_budget.device", lambda: torch.device(on))
    monkeypatch.setattr("sweeper.training.memory_budget.device_report", lambda _: report)
    monkeypatch.setattr("sweeper.modeling.memory_estimate.choose_dtype", _fp32)
    size = TrialSize(trainable=1, total=1, rank=8, held_mib=held)
    if message is None:
        MemoryBudget().require(settings, size, prepared if known else None)
        return
    with pytest.raises(DoesNotFit, match=message):
        MemoryBudget().require(settings, size, prepared if known else None)


def test_the_sparing_form_keeps_the_effective_batch() -> None:
    """One row at a time; activations are recomputed unless the settings rule it out."""
    for asked, recomputed in (("auto", True), ("true", True), ("false", False)):
        settings = make_settings(
            *("training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2"),
            f"training.activation_checkpointing={asked}",
        )
        least = smallest_form(settings.trial).training
        assert least.per_device_train_batch_size == 1
        assert least.effective_batch_size == 16
        assert least.activation_checkpointing is recomputed


def _fp32(*_: object) -> object:
    class Precision:
        dtype = torch.float32

    return Precision()
