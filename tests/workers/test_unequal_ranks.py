"""Ranks that have other rows, other micro-batches or none: the trial of one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sweeper.data.tokens import IGNORED
from sweeper.training.trainer import JudgedTrainer
from tests.workers.together import Train, spooled

EPOCHS = ("training.max_steps=null", "training.num_train_epochs=2", "training.eval_steps=epoch")
# 32 training rows in steps of ten: the last step has two, which are all on the first of two ranks
TEN = {
    False: ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=10"),
    True: ("training.per_device_train_batch_size=5", "training.gradient_accumulation_steps=2"),
}
FULL = ("adapter=none", "training.optim=adamw_torch")
ARMS: dict[str, tuple[str, ...]] = {
    "lora": ("adapter.r=4", "adapter.lora_dropout=0"),
    "full": FULL,
    "fsdp": (*FULL, "training.fsdp=true"),
    "packing": (
        "adapter.r=4",
        "adapter.lora_dropout=0",
        "data.packing=true",
        "data.max_length=160",
    ),
}


@pytest.fixture
def uneven_rows(tmp_path: Path) -> Path:
    """Forty rows, of which every fifth is long."""
    path = tmp_path / "uneven.jsonl"
    rows = [
        {
            "instruction": "Count.",
            "input": "word " * (80 if number % 5 == 0 else 2),
            "output": f"{number}.",
        }
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["without padding", "padded"])
@pytest.mark.parametrize("name", ARMS)
def test_ranks_with_other_rows_train_the_trial_of_one_device(
    train: Train, uneven_rows: Path, monkeypatch: pytest.MonkeyPatch, name: str, padded: bool
) -> None:
    """Every loss of an epoch whose last step leaves a rank without a row, and of the next one."""
    # A setting reaches the follower, too
    attention = ("model.attn_implementation=eager",) if padded else ()
    counts: list[int] = []
    fillers: list[bool] = []
    split = JudgedTrainer._micro_batches

    def watching(trainer: Any, *given: Any) -> Any:
        parts = split(trainer, *given)
        counts.append(len(parts))
        fillers.extend(not (part["labels"] != IGNORED).any() for part in parts)
        return parts

    monkeypatch.setattr(JudgedTrainer, "_micro_batches", watching)
    options = (f"data.train={uneven_rows}", *EPOCHS, *TEN[padded], *attention, *ARMS[name])
    alone = tuple(option for option in options if option != "training.fsdp=true")
    _, one, first = train("one", *alone)
    counts.clear()
    fillers.clear()
    outcome, two, second = train("two", *options, "training.devices_per_trial=2")
    assert outcome.cause == "finished", outcome.message
    assert [value for _, value in two.losses] == pytest.approx([v for _, v in one.losses], abs=1e-5)
    assert len(two.losses) == 2
    assert spooled(second, "train/loss") == pytest.approx(spooled(first, "train/loss"), abs=1e-5)
    assert bool(counts) is not padded
    if counts and name != "packing":
        assert len(set(counts)) > 1, "a step needs another number of micro-batches than the next"
        assert any(fillers), "the leader needs fewer than its follower at least once"
