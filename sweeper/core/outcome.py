"""What workers tell about a trial: the vocabulary shared by the worker's and the driver's side.

Plain frozen values that travel as JSON; no torch, no Optuna, no MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sweeper.core.errors import StudyError
from sweeper.core.value import FrozenValue

Cause = Literal[
    "finished",
    "early_stopped",
    "pruned",
    "oom",
    "diverged",
    "timeout",
    "crash",
    "cancelled",
    "error",
    "refused",
    "duplicate",
]
"""Why a trial ended."""

StopCause = Literal["pruned", "cancelled"]
"""Why the driver may ask a worker to stop a trial."""


def device_seconds(metrics: Mapping[str, float]) -> float:
    """Device time of a trial: its seconds times its devices (one, where that was not recorded yet)."""
    return metrics.get("cost/device_seconds", metrics.get("cost/seconds", 0.0))


class Outcome(FrozenValue):
    """How a trial ended. Names in `metrics` carry their unit; all values are finite."""

    cause: Cause
    best_value: float | None = None
    """The objective's value of the kept checkpoint, on the whole validation split."""
    best_step: int | None = None
    steps: int = 0
    """Optimiser steps that were trained."""
    metrics: dict[str, float] = Field(default_factory=dict)
    message: str | None = None
    """For people: why it failed, or the traceback of a code error."""

    @property
    def spent(self) -> dict[str, float]:
        """Its metrics, to sum costs from: none of a duplicate, whose figures are its twin's."""
        return {} if self.cause == "duplicate" else self.metrics


class ExampleLosses(FrozenValue):
    """The loss of one model on each example of a split, in the split's order."""

    nll: tuple[float, ...]
    """Summed negative log-likelihood of each example's target tokens, in nats."""
    tokens: tuple[int, ...]
    """How many target tokens each sum is over."""

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return math.fsum(self.nll) / sum(self.tokens)


HeldOutKind = Literal["test", "general"]
"""A field of Unseen."""


class HeldOutLosses(FrozenValue):
    """What one model loses on texts that no search sees."""

    test: ExampleLosses | None = None
    """On each example of the test split; None if the data have none."""
    general: ExampleLosses | None = None
    """On each window of general text; None if none is named (evaluation.general_text)."""


class BaselineRun(FrozenValue):
    """An earlier full fine-tune that stands in for an arm's own search, and what is known of it."""

    run_id: str
    """MLflow's."""
    model: Path
    """Its weights in transformers' layout, on this machine."""
    params: dict[str, str]
    """As its run recorded them."""
    costs: dict[str, float]
    """Of its training, as its run recorded them."""
    data_digest: str | None
    base_digest: str | None
    """Of what it was trained on; None where its run does not say."""
    trials: int
    """Finished trials of the search it came from; 0 where no search is known."""
    rates: tuple[float, ...]
    """Learning rates that the search tried, in rising order."""
    best_rate: float | None
    """The one that the search's own objective found best."""
    seconds: float
    """Worker time of that search."""

    @property
    def short(self) -> str:
        """Enough of the run's id to tell it by."""
        return self.run_id[:8]

    @property
    def settings(self) -> dict[str, Any]:
        """What its run says of its settings, as they were before MLflow made them texts."""
        return {key: _untexted(text) for key, text in self.params.items()}


def _untexted(text: str) -> int | float | bool | str:
    """What str() made this text of."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class TrialSize(FrozenValue):
    """How large a trial is on its model, known before a weight is loaded."""

    trainable: int
    """Parameters that are trained, as PEFT counts them."""
    total: int
    rank: int | None
    """The adapter's r, also where it follows from adapter.trainable_parameters; None without one."""
    held_mib: float
    """Weights, gradients and optimizer states: what it needs whatever its batch."""


class ArmBaseline(FrozenValue):
    """What is known of an arm before its first trial."""

    base_digest: str
    base_commit: str | None
    """The hub's commit, where the base comes from a hub."""
    base_metrics: dict[str, float]
    """The untuned base, as this arm holds it, under the same judge as every trial."""
    base_parameters: int
    data_digest: str
    data_source: str
    data_format: str
    rows: dict[str, int]
    """Examples by split, after dropping."""
    dropped: dict[str, int]
    target_tokens: int
    """Target tokens of the validation split: what the loss is a mean over."""
    device: str
    """A GPU's name; a CPU's, and ", 2 threads"."""
    dtype: str
    general_digest: str | None = None
    """Of the windows of general text; None if none is named."""

    @property
    def repeatable(self) -> bool:
        """Whether the device computes the same bits again: a GPU's kernels add in any order."""
        return self.device.endswith(" threads")

    def base_value(self, metric: str) -> float:
        """The untuned base's value of a metric: what every trial is held against.

        Raises:
            StudyError: the base was not judged by it, or its value is not finite.
        """
        if metric not in self.base_metrics:
            known = ", ".join(
                name for name in sorted(self.base_metrics) if name.startswith("eval/")
            )
            raise StudyError(
                f"objective.metric={metric}: the untuned base has no finite value of it; "
                f"it has {known}"
            )
        return self.base_metrics[metric]


class TrialFootprint(FrozenValue):
    """How large a trial would be; figures that are not known are None."""

    trainable: int | None = None
    total: int | None = None
    artifact_mib: float | None = None
    peak_mib: float | None = None
    """Device memory."""
    problem: str | None = None
    """Why nothing is known: the model cannot be had, or the adapter does not fit it."""


GATE_BASE = "base"
"""Name of the untuned base among the models that were judged on a gate."""


class GateRequest(FrozenValue):
    """Which stored adapters are to be judged on which gate."""

    gate: str
    """A file, a folder or a hub id, read as the first trial's `data` section says."""
    trials: dict[str, Path]
    """Folders of trials by name; the untuned base is the first one's."""


class GateFigures(FrozenValue):
    """Losses of several models on the same examples in the same order, or why there are none."""

    tokens: list[int] = Field(default_factory=list)
    """Target tokens of each example."""
    nll: dict[str, list[float]] = Field(default_factory=dict)
    """Summed negative log-likelihood of each example in nats, by model; `base` among them."""
    left_out: int = 0
    """Rows of the gate that stand in another split of a model."""
    general_tokens: list[int] = Field(default_factory=list)
    """Target tokens of each window of general text; empty if the first trial names none."""
    general: dict[str, list[float]] = Field(default_factory=dict)
    """As nll, of those windows."""
    problem: str | None = None

    def forgotten(self, name: str) -> float | None:
        """Nats per token that one model is worse than the untuned base on general text."""
        if not self.general_tokens:
            return None
        nll = math.fsum(self.general[name]) - math.fsum(self.general[GATE_BASE])
        return nll / sum(self.general_tokens)
