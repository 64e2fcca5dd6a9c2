"""One trial on several devices: the same trial as on one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sweeper.core.errors import ConfigError, InputsChanged, WorkerError
from sweeper.core.paths import TrialFolder
from sweeper.training.trial_runner import TransformersRunner
from sweeper.workers.devices import devices_of, survey_devices
from sweeper.workers.followers import FollowerGroup
from tests.conftest import make_settings
from tests.training.recorder import Recorder
from tests.workers.together import KillsFollowers, Train, spooled


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(("adapter.r=4", "quantization=nf4"), id="qlora"),
        pytest.param(("adapter=none",), id="full", marks=pytest.mark.slow),
        pytest.param(
            ("adapter.r=4", "training.gradient_accumulation_steps=2"),
            id="accumulated",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_devices_train_the_trial_of_one(train: Train, arm: tuple[str, ...]) -> None:
    """Losses of training and evaluation, and the stored weights, are those of a single device."""
    alone, one, first = train("one", *arm)
    together, two, second = train("two", *arm, "training.devices_per_trial=2")
    assert together.cause == alone.cause == "finished"
    assert [step for step, _ in two.losses] == [2, 4, 6]
    losses = [value for _, value in one.losses]
    assert [value for _, value in two.losses] == pytest.approx(losses, abs=1e-5)
    assert spooled(second, "train/loss") == pytest.approx(spooled(first, "train/loss"), abs=1e-5)
    name = "adapter_model.safetensors" if first.adapter.exists() else "model.safetensors"
    assert first.artifact is not None
    assert second.artifact is not None
    assert together.metrics["cost/device_seconds"] == 2 * together.metrics["cost/seconds"]
    weights = load_file(second.artifact / name)
    for key, value in load_file(first.artifact / name).items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_stop_reaches_every_device(train: Train, followers: FollowerGroup) -> None:
    """A pruned trial ends on all of its devices at the same step, and the next one trains."""
    outcome, _, _ = train("first", "training.devices_per_trial=2", observer=Recorder(stop_after=1))
    assert (outcome.cause, outcome.steps) == ("pruned", 2)
    outcome, _, _ = train("second", "training.devices_per_trial=2")
    assert outcome.cause == "finished"


@pytest.mark.slow
def test_a_dead_follower_is_the_workers_fault(train: Train) -> None:
    """The trial does not fail: its worker does, and another one continues it from its checkpoint."""
    with pytest.raises(WorkerError, match="rank 1 died"):
        train("again", "training.devices_per_trial=2", observer=KillsFollowers())
    outcome, recorder, folder = train("again", "training.devices_per_trial=2")
    assert outcome.cause == "finished"
    assert [step for step, _ in recorder.losses] == [4, 6]
    assert len(spooled(folder, "eval/loss")) == 3


@pytest.mark.slow
def test_a_follower_that_loads_other_files_ends_no_trial(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The leader holds the earlier rows in memory, and its follower reads those of today."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, rows)
    followers = FollowerGroup([None, None], threads=1, log=tmp_path / "worker_0.log")
    runner = TransformersRunner(1, followers.join)
    settings = make_settings(
        *(f"model.base_model={tiny_base}", f"data.train={rows}", "quantization=none"),
        *("training.max_steps=2", "training.devices_per_trial=2"),
        "training.per_device_train_batch_size=4",
    ).trial
    expected = runner.probe(settings).inputs
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    try:
        with pytest.raises(InputsChanged, match="data digest: "):
            runner.run(settings, TrialFolder(tmp_path / "t"), {}, Recorder(), expected)
    finally:
        followers.close()
    assert not (tmp_path / "t" / "outcome.json").exists()


def test_a_worker_without_followers_says_so(train: Train) -> None:
    """More devices than the worker has are refused, with the number it has."""
    outcome, _, _ = train("wide", "training.devices_per_trial=4")
    assert outcome.cause == "refused"
    assert outcome.message is not None
    assert "devices_per_trial=4: this worker has 2 devices" in outcome.message


def test_devices_share_a_batch_evenly() -> None:
    """A batch that cannot be shared evenly is refused before anything is trained."""
    with pytest.raises(ConfigError, match=r"16 examples a step .* among 3 devices"):
        make_settings("training.devices_per_trial=3")


@pytest.mark.parametrize(
    ("visible", "worker", "count", "devices"),
    [
        ("2,5", 0, 1, ["2"]),
        ("2,5", 1, 1, ["5"]),
        ("2,5", 2, 1, ["2"]),
        ("0,1,2,3", 1, 2, ["2", "3"]),
        ("4,5", 3, 2, ["4", "5"]),  # a cluster gave this worker just these two
        ("", 1, 1, [None]),
        ("", 0, 2, [None, None]),
    ],
)
def test_workers_share_out_the_visible_gpus(
    visible: str,
    worker: int,
    count: int,
    devices: list[str | None],
) -> None:
    """Each worker has GPUs of its own, as many as its trials train on; without any, the CPU."""
    survey = survey_devices("2.11.0+cu130", {"CUDA_VISIBLE_DEVICES": visible})
    assert devices_of(worker, count, survey) == devices
