"""The rows a trial trains on: in which order, and packed or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from sweeper.training.trial_costs import TrialCosts
from sweeper.training.trial_runner import TransformersRunner
from tests.training.batches import count_rows, rows_of
from tests.training.conftest import RunTiny

EVERY_ROW = (
    *("training.per_device_train_batch_size=64", "adapter=none", "training.learning_rate=0.01"),
    *("data.test_ratio=0", "data.validation_ratio=0.2", "data.max_length=256"),
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, torch.Tensor]]:
    """The micro-batches that are trained on, as they come."""
    batches: list[Mapping[str, torch.Tensor]] = []
    add_step = TrialCosts.add_step

    def remember(
        costs: TrialCosts,
        shown: Sequence[Mapping[str, torch.Tensor]],
        targets: torch.Tensor,
        devices: int,
    ) -> None:
        batches.extend(shown)
        add_step(costs, shown, targets, devices)

    monkeypatch.setattr(TrialCosts, "add_step", remember)
    return batches


def test_order_by_is_the_order_of_training(
    run_tiny: RunTiny, tmp_path: Path, seen: list[Mapping[str, torch.Tensor]]
) -> None:
    """Written from hard to easy, trained from easy to hard; without order_by the seed shuffles."""
    path = tmp_path / "graded.jsonl"
    rows = [
        {"instruction": "Name it.", "input": f"grade {n}.", "output": "Sum.", "grade": n}
        for n in range(39, -1, -1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = ("training.per_device_train_batch_size=8", "training.max_steps=3")
    runner = TransformersRunner(threads=1)

    def trained(name: str, *overrides: str) -> list[int]:
        seen.clear()
        outcome, _, _ = run_tiny(name, f"data.train={path}", *small, *overrides, runner=runner)
        assert outcome.cause == "finished", outcome.message
        tokenizer = next(iter(runner._prepared.values())).tokenizer
        texts = (tokenizer.decode(row) for batch in seen for row in rows_of(batch))
        return [int(re.findall(r"grade (\d+)", text)[0]) for text in texts]

    ordered = trained("ordered", "data.order_by=grade")
    assert ordered == sorted(ordered)
    first = next(iter(runner._prepared.values())).splits.examples["train"][:8]
    assert ordered[:8] == [example.row.values["grade"] for example in first]
    shuffled = trained("shuffled")
    assert shuffled != sorted(shuffled)
    assert shuffled != sorted(shuffled, reverse=True)


def test_packed_rows_teach_what_they_teach_alone(
    run_tiny: RunTiny, seen: list[Mapping[str, torch.Tensor]]
) -> None:
    """With all rows in every step, packs of several rows give the losses of the rows one by one."""
    alone, losses, _ = run_tiny("alone", *EVERY_ROW)
    rows = count_rows(seen[0])
    seen.clear()
    packed, packed_losses, _ = run_tiny("packed", *EVERY_ROW, "data.packing=true")
    assert "position_ids" in seen[0]
    assert alone.cause == packed.cause == "finished"
    assert alone.metrics["data/train_rows"] == rows
    assert packed.metrics["data/train_rows"] < rows / 2
    tokens = "data/train_target_tokens"
    assert packed.metrics[tokens] == alone.metrics[tokens]
    assert packed_losses == [pytest.approx(item, abs=1e-3) for item in losses]
    assert losses[-1][1] < losses[0][1] - 0.1


def test_packing_leaves_the_validation_rows_alone(run_tiny: RunTiny) -> None:
    """data.packing changes neither the rows that are judged nor the untuned base's loss."""
    found = {}
    for packing in ("false", "true"):
        runner = TransformersRunner(threads=1)
        outcome, _, _ = run_tiny(packing, f"data.packing={packing}", runner=runner)
        (data,) = runner._prepared.values()
        assert outcome.metrics["data/validation_rows"] == len(data.validation.rows)
        found[packing] = data.validation.rows
    assert found["true"] == found["false"]
    assert all(set(row) == {"input_ids", "labels"} for row in found["true"])
