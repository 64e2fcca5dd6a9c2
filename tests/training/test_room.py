"""What a GPU has room for decides how a trial is batched; on a CPU nothing is estimated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sweeper.modeling.base import load_base
from sweeper.modeling.hardware import DeviceReport
from sweeper.training.prepare import prepare
from sweeper.training.room import Room
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
    room = Room()
    assert room.fits(prepared)(settings) is None

    monkeypatch.setattr("sweeper.training.room.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("sweeper.modeling.memory_estimate.choose_dtype", _fp32)
    for free, fits in ((1e6, True), (1.0, False)):
        report = DeviceReport("GPU", "sm_80", True, 2 * free, free)
        monkeypatch.setattr("sweeper.training.room.device_report", lambda _, found=report: found)
        assert room.fits(prepared)(settings) is fits


def _fp32(*_: object) -> object:
    class Precision:
        dtype = torch.float32

    return Precision()
