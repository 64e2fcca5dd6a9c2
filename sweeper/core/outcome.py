"""Values that describe a trial's result, a trial's size and an arm's baseline.

Workers send them to the driver as JSON. Imports no torch, Optuna or MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sweeper.core.errors import StudyError
from sweeper.core.input_digests import InputDigests
from sweeper.core.paths import TrialFolder
from sweeper.core.stored_files import read_stored
from sweeper.core.value import FrozenValue

# A value that an older version stored is written as that version wrote it
LATER: Any = Field(default=None, exclude_if=lambda value: value is None)
"""Default of a field that older versions did not have."""

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
"""Reason why a trial ended."""

SELF_ENDED: frozenset[Cause] = frozenset({"finished", "early_stopped"})
"""Causes of trials that ran to their own end. Only these are judged on the whole validation split."""

StopCause = Literal["pruned", "cancelled"]
"""Reason for which the driver may stop a trial."""


LOOK_ROWS = "best/look_rows"
"""Metric of a trial whose other best/ metrics were measured on a sample: the sample's rows."""
ANSWER_RATE = "cost/generated_tokens_per_second"
"""Metric of a judgement: tokens of its generated answers per second."""
ANSWERING_SECONDS = "cost/answering_seconds"
"""Metric of a judgement: seconds of its generated answers."""


def device_seconds(metrics: Mapping[str, float]) -> float:
    """Return the device time of a trial in seconds: wall time times the number of devices."""
    # Trials stored before devices were recorded used one device.
    return metrics.get("cost/device_seconds", metrics.get("cost/seconds", 0.0))


def trained_tokens(metrics: Mapping[str, float]) -> float:
    """Return the tokens that a trial was trained on, or 0 if its throughput was not measured."""
    rate, seconds = metrics.get("cost/tokens_per_second"), metrics.get("cost/train_seconds")
    return 0.0 if rate is None or seconds is None else rate * seconds


class Outcome(FrozenValue):
    """Result of a trial. Metrics carry their unit in their name, and all values are finite."""

    cause: Cause
    best_value: float | None = None
    """Objective value of the kept checkpoint: on the whole validation split if the trial ran to its own
    end, else of the trial's look at the checkpoint (see `look_rows`)."""
    best_step: int | None = None
    """Optimizer step of the kept checkpoint."""
    steps: int = 0
    """Number of optimizer steps that were trained."""
    metrics: dict[str, float] = Field(default_factory=dict)
    message: str | None = None
    """Reason of a failure for people, or the traceback of a code error."""
    inputs: InputDigests | None = LATER
    """Digests of what the trial read. None: an older version stored the outcome, or it read nothing."""

    @property
    def look_rows(self) -> int | None:
        """Number of rows of the sample that `best_value` is of, or None if it is of the whole split."""
        rows = self.metrics.get(LOOK_ROWS)
        return None if rows is None else int(rows)

    @property
    def ending(self) -> str:
        """The cause for tables, with the size of the sample that the value is of, if it is of one."""
        rows = self.look_rows
        return self.cause if rows is None else f"{self.cause} (value of {rows} rows)"

    @property
    def spent(self) -> dict[str, float]:
        """Metrics to sum costs from. Empty for a duplicate trial."""
        # A duplicate copies the metrics of the trial that it repeats. Its costs must not count twice.
        return {} if self.cause == "duplicate" else self.metrics


class ExampleScores(FrozenValue):
    """A metric of one model on each example of a split, as sums over weights."""

    metric: str
    values: tuple[float, ...]
    """Sum of the metric over each example. With weights of 1 it is the example's score."""
    weights: tuple[float, ...]

    @property
    def value(self) -> float:
        """Value of the metric on the split."""
        return math.fsum(self.values) / math.fsum(self.weights)


class ExampleLosses(FrozenValue):
    """Loss of one model on each example of a split, in the order of the split."""

    nll: tuple[float, ...]
    """Summed negative log-likelihood of each example's target tokens, in nats."""
    tokens: tuple[int, ...]
    """Number of target tokens of each example."""
    groups: tuple[int, ...] = ()
    """Number of the group of data.group_by that each example belongs to. Empty without groups."""
    scores: ExampleScores | None = None
    """The objective on each example, if it is not the loss and is made of examples."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per target token."""
        # fsum rounds only once, so the order of the rows does not matter.
        return math.fsum(self.nll) / sum(self.tokens)


ServeForm = Literal["trained", "unquantized", "merged"]
"""Form of a winner: adapter on the base of its training, on the unquantized one, or merged."""
HeldOutKind = Literal["test", "general"]
"""Name of a field of HeldOutLosses."""


class HeldOutLosses(FrozenValue):
    """Losses of one model on texts that the search never uses."""

    test: ExampleLosses | None = None
    """Losses on the examples of the test split, or None if there is no test split."""
    general: ExampleLosses | None = None
    """Losses on the windows of general text, or None without evaluation.general_text."""


class BaselineRun(FrozenValue):
    """An earlier full fine-tune, recorded in MLflow, that replaces an arm's own search."""

    run_id: str
    """Id of the MLflow run."""
    model: Path
    """Folder of the weights in transformers' layout, on this machine."""
    params: dict[str, str]
    """Parameters that the run recorded."""
    costs: dict[str, float]
    """Costs of the training that the run recorded."""
    data_digest: str | None
    """Digest of the training data, or None if the run did not record one."""
    base_digest: str | None
    """Digest of the base model, or None if the run did not record one."""
    trials: int
    """Finished trials of the search that found the run, or 0 if no search is known."""
    rates: tuple[float, ...]
    """Learning rates that the search tried, in ascending order."""
    best_rate: float | None
    """Learning rate that was best by the search's own objective."""
    seconds: float
    """Worker time of the search in seconds."""

    @property
    def short(self) -> str:
        """First eight characters of the run's id, for messages."""
        return self.run_id[:8]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the run recorded, converted back from MLflow's texts."""
        return {key: _parsed_param(text) for key, text in self.params.items()}


def _parsed_param(text: str) -> int | float | bool | str:
    """Return the bool or number that a text represents, or the text itself."""
    # MLflow stores parameters as text.
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class TrialSize(FrozenValue):
    """Parameters and memory of a trial, known before any weights are loaded."""

    trainable: int
    """Number of trainable parameters, as PEFT counts them."""
    total: int
    """Number of all parameters, base and adapter."""
    rank: int | None
    """Rank r of the adapter, also if derived from adapter.trainable_parameters. None without adapter."""
    held_mib: float
    """MiB of weights, gradients and optimizer states, which are needed at any batch size."""


def stored_outcome(folder: TrialFolder) -> Outcome | None:
    """Return the outcome that a trial's worker stored, or None without one that can be read."""
    return read_stored(folder.outcome, Outcome, "the trial is taken for one that has not ended")


class ArmBaseline(FrozenValue):
    """Facts about an arm's base model, data and device, measured before its first trial."""

    base_digest: str
    base_commit: str | None
    """Commit of the base model on the hub, or None if the base is not from the hub."""
    base_metrics: dict[str, float]
    """Metrics of the untuned base, quantized as in this arm, by the same judge as every trial."""
    # Quantization alone changes the base's loss (NF4 by 0.014 nats on the embedded base), so every arm
    # is compared with its own base.
    base_parameters: int
    data_digest: str
    data_source: str
    data_format: str
    rows: dict[str, int]
    """Number of examples by split, after dropping."""
    dropped: dict[str, int]
    """Number of dropped rows by reason."""
    changed: dict[str, int] = Field(default_factory=dict, exclude_if=lambda found: not found)
    """Number of rows that were kept, by what was changed in them."""
    unread: dict[str, int] = Field(default_factory=dict, exclude_if=lambda found: not found)
    """Columns and keys of turns that no format reads, with the number of rows that have a value."""
    target_tokens: int
    """Number of target tokens of the validation split, over which the loss is a mean."""
    device: str
    """Name of the GPU, or name of the CPU followed by ", 2 threads"."""
    dtype: str
    general_digest: str | None = None
    """Digest of the windows of general text, or None without general text."""
    config_digest: str | None = LATER
    """Digest of the base configuration. None here and below: an older version stored the facts."""
    judged_digest: str | None = LATER
    """Digest of the encoded rows that are judged, with the settings of the judge."""
    trained_digest: str | None = LATER
    """Digest of the encoded rows that are trained on."""
    test_digest: str | None = LATER
    """Digest of the encoded test rows, or None without a test split."""
    padded_because: str | None = LATER
    """Reason why batches are padded although they need not be on this device, or None."""
    judging_s: float | None = Field(default=None, exclude_if=lambda found: found is None)
    """Seconds of judging the untuned base by losses alone, or None if an older version stored the facts.

    Those of its answers are among `base_metrics`."""
    base_remarks: tuple[str, ...] = Field(default=(), exclude_if=lambda found: not found)
    """Sentences on what loading the base had to change, or could not do as asked."""
    equal_presets: dict[str, str] = Field(default_factory=dict, exclude_if=lambda found: not found)
    """Presets of target modules that adapt the same weights of this base as another preset, with its
    name."""

    @property
    def inputs(self) -> InputDigests:
        """The digests that every trial on this data and this base model must find again."""
        return InputDigests(
            data=self.data_digest,
            base=self.base_digest,
            config=self.config_digest,
            judged=self.judged_digest,
            trained=self.trained_digest,
            test=self.test_digest,
            general=self.general_digest,
        )

    @property
    def repeatable(self) -> bool:
        """True if the device computes the same bits again, as a CPU does."""
        # GPU kernels add in varying order.
        return self.device.endswith(" threads")

    def base_value(self, metric: str) -> float:
        """Return the untuned base's value of a metric, which every trial is compared with.

        Raises:
            StudyError: The metric was not measured on the base, or its value is not finite.
        """
        if metric not in self.base_metrics:
            known = ", ".join(
                name for name in sorted(self.base_metrics) if name.startswith("eval/")
            )
            raise StudyError(
                f"objective.metric={metric}: the untuned base has no finite value of this metric. "
                f"It has {known}."
            )
        return self.base_metrics[metric]


class TrialFootprint(FrozenValue):
    """Estimated size of a trial for a dry run. Unknown figures are None."""

    trainable: int | None = None
    """Number of trainable parameters."""
    total: int | None = None
    """Number of all parameters, base and adapter."""
    artifact_mib: float | None = None
    """MiB of the stored adapter or model."""
    peak_mib: float | None = None
    """MiB of device memory at the peak."""
    problem: str | None = None
    """Reason why there are no figures: the model is unavailable, or the adapter does not suit it."""


class TrialTiming(FrozenValue):
    """Data and seconds of a trial for a forecast. Unknown figures are None."""

    source: str = ""
    """Origin of the training rows."""
    rows: dict[str, int] = Field(default_factory=dict)
    """Rows by split."""
    windows: int = 0
    """Windows of general text."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Dropped rows by reason."""
    unread: dict[str, int] = Field(default_factory=dict)
    """Columns that are not read, with the number of rows that have a value."""
    steps: int = 0
    """Optimiser steps of the whole schedule."""
    looks: int = 0
    """Evaluations inside the schedule."""
    step_s: float | None = None
    """Seconds of one optimiser step after the first."""
    setup_s: float = 0.0
    """Seconds of a training besides its steps: the optimiser, and what the first step prepares."""
    look_s: float = 0.0
    """Seconds of one evaluation inside the schedule, with answers if the objective needs them."""
    judgement_s: float = 0.0
    """Seconds of judging the kept checkpoint on the whole validation split, without answers."""
    answers_s: float = 0.0
    """Seconds of the answers of the kept checkpoint, those to evaluation.prompts included."""
    save_s: float = 0.0
    """Seconds of storing the checkpoints and the model."""
    load_s: float = 0.0
    """Seconds of loading the base again for each training, if a training changes its weights."""
    row_s: float | None = None
    """Seconds of judging one row of the validation split."""
    untuned_s: float = 0.0
    """Seconds of judging the untuned base on the validation split, with its answers."""
    test_s: float = 0.0
    """Seconds of judging one model on the test split."""
    general_s: float = 0.0
    """Seconds of judging one model on general text."""
    cpu_share: float | None = None
    """CPU seconds in a second of the timed steps, or None on a GPU. Other programs make it small."""
    start_s: float | None = None
    """Seconds of loading base and data, once for a worker, with its libraries for the first arm."""
    need_mib: float | None = None
    """MiB at the peak: measured, or estimated for a trial that does not fit."""
    free_mib: float | None = None
    """Free MiB of the device."""
    problem: str | None = None
    """Reason why there are no figures."""

    @property
    def training_s(self) -> float | None:
        """Seconds of a training that runs to the end of its schedule, or None if it was not timed."""
        if self.step_s is None:
            return None
        judged_s = self.looks * self.look_s + self.judgement_s + self.answers_s
        return self.setup_s + self.steps * self.step_s + judged_s + self.save_s + self.load_s


GATE_BASE = "base"
"""Name of the untuned base among the models that were judged on a gate."""


class GateRequest(FrozenValue):
    """Request to evaluate stored adapters on a gate (the held-out data that decides on champions)."""

    gate: str
    """File, folder or hub id of the gate, read according to the first trial's `data` section."""
    trials: dict[str, Path]
    """Folders of the trials by name. The first trial determines the untuned base."""


class GateFigures(FrozenValue):
    """Losses of several models on the same examples in the same order, or the reason for having none."""

    tokens: list[int] = Field(default_factory=list)
    """Target tokens of each example."""
    nll: dict[str, list[float]] = Field(default_factory=dict)
    """Summed negative log-likelihood of each example in nats, by model. One model is `base`."""
    left_out: int = 0
    """Number of rows of the gate that were dropped because a split of a trial contains them."""
    general_tokens: list[int] = Field(default_factory=list)
    """Target tokens of each window of general text. Empty if the first trial has no general text."""
    general: dict[str, list[float]] = Field(default_factory=dict)
    """Summed negative log-likelihood of each window of general text in nats, by model."""
    problem: str | None = None

    def forgotten(self, name: str) -> float | None:
        """Return the increase of the loss on general text over the untuned base, in nats per token.

        Returns:
            A positive number if the model has forgotten, or None without general text.
        """
        if not self.general_tokens:
            return None
        nll = math.fsum(self.general[name]) - math.fsum(self.general[GATE_BASE])
        return nll / sum(self.general_tokens)
