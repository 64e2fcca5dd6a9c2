"""What is said of an adopted run that was trained otherwise, or that does not say how."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.config.settings import flatten
from sweeper.core.outcome import BaselineRun
from sweeper.driver.trial_sizes import recorded
from sweeper.reporting.baseline_doubts import baseline_doubts
from sweeper.reporting.results import ArmResult
from sweeper.tracking.tracking_ledger import as_texts
from tests.conftest import make_settings
from tests.reporting.studies import FACTS, FAIRNESS, FULL_COSTS, make_arm, make_trial

FULL = ("adapter=none", "quantization=none")


def _arm(params: dict[str, str], *overrides: str) -> ArmResult:
    """An arm of these settings whose run says this; its data, base and search leave no doubt."""
    adopted = BaselineRun(
        run_id="abc",
        model=Path("model"),
        params=params,
        costs={},
        data_digest=FACTS.data_digest,
        base_digest=FACTS.base_digest,
        trials=3,
        rates=(1e-4, 1e-3, 1e-2),
        best_rate=1e-3,
        seconds=1.0,
    )
    settings = flatten(make_settings(*FULL, *overrides).trial.model_dump(mode="json"))
    arm = make_arm("full", [make_trial("full", 0, "finished", 4.0, FULL_COSTS)], "full fine-tuning")
    return arm.model_copy(update={"settings": settings, "adopted": adopted})


def _params(*overrides: str) -> dict[str, str]:
    """What a run of ours says."""
    rate = "training.learning_rate=1e-3"
    return as_texts(recorded(make_settings(*FULL, rate, *overrides).trial))


def _doubts(params: dict[str, str], *overrides: str) -> list[str]:
    return list(baseline_doubts(_arm(params, *overrides), FAIRNESS))


@pytest.mark.parametrize(
    ("override", "then", "now"),
    [
        ("data.template=plain", "data.template=plain", "data.template=auto"),
        ("data.train_on=everything", "data.train_on=everything", "data.train_on=completions"),
        ("data.max_length=64", "data.max_length=64", "data.max_length=512"),
        ("data.over_length=truncate", "data.over_length=truncate", "data.over_length=drop"),
        ("data.packing=true", "data.packing=True", "data.packing=False"),
        ("training.max_steps=32", "training.max_steps=32", "training.max_steps=64"),
        ("training.max_steps=null", "training.num_train_epochs=1", "training.max_steps=64"),
        ("training.gradient_accumulation_steps=4", "64 examples per step", "16 examples per step"),
    ],
)
def test_each_way_of_training_otherwise_is_a_doubt(override: str, then: str, now: str) -> None:
    """What the run was trained with, and what this study trains with."""
    assert _doubts(_params(override)) == [f"was trained with {then}, not {now}"]


def test_the_same_training_is_no_doubt() -> None:
    """Epochs say nothing where max_steps decides, nor does how a step's batch is shared out."""
    shared = ("training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2")
    assert not _doubts(_params("training.num_train_epochs=7", *shared))
    epochs = ("training.max_steps=null", "training.num_train_epochs=2")
    assert not _doubts(_params(*epochs), *epochs)


def test_what_a_run_does_not_say_is_a_doubt() -> None:
    """Runs before these were recorded, and runs of other programs, which say odd things."""
    silent = {key: text for key, text in _params().items() if not key.startswith("data.t")}
    assert _doubts(silent) == ["does not record its data.template, data.train_on"]
    odd = {**_params(), "training.max_steps": "-1", "training.num_train_epochs": "None"}
    odd["training.per_device_train_batch_size"] = "auto"
    assert _doubts(odd) == ["does not record its length, effective batch"]
