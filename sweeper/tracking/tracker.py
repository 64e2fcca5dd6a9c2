"""What the driver tells a tracker: one parent run a study, one child run a trial.

No call waits for a network: a tracker works in its own thread. What it could not record it says at
the end; the trial folders remain the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sweeper.folders import TrialFolder
from sweeper.outcome import Facts
from sweeper.settings import Data, Objective, TrialSettings, flatten, sources
from sweeper.space import Scalar

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""MLflow's final states; KILLED is what it shows for a pruned trial."""


RUN_PARAMS = (
    *("model.base_model", "model.revision", "data.train", "data.max_length", "data.packing"),
    *("quantization.load_in_4bit", "quantization.load_in_8bit", "quantization.bnb_4bit_quant_type"),
    *("adapter.method", "adapter.r", "adapter.alpha_over_r", "adapter.lora_alpha"),
    *("adapter.lora_dropout", "adapter.target_modules", "adapter.use_rslora", "adapter.use_dora"),
    *("training.learning_rate", "training.lr_scheduler_type", "training.optim"),
    *("training.warmup_ratio", "training.warmup_steps", "training.weight_decay"),
    *("training.num_train_epochs", "training.max_steps", "training.per_device_train_batch_size"),
    *("training.gradient_accumulation_steps", "seed"),
)
"""What runs are compared by, in every run under the same name; the rest is in its config.yaml."""


def run_params(settings: TrialSettings, point: Mapping[str, Scalar]) -> dict[str, Any]:
    """A run's parameters: RUN_PARAMS, and whatever else was searched."""
    known = flatten(settings.model_dump(mode="json", exclude_none=True))
    kept = {name: known[name] for name in RUN_PARAMS if name in known}
    return {**kept, **{name: known.get(name, value) for name, value in point.items()}}


@dataclass(frozen=True)
class DatasetRecord:
    """The data of a run, as MLflow's input: one digest over all splits."""

    name: str
    digest: str
    sources: tuple[str, ...]
    """Files, folders, URLs and hub ids, as they were written."""
    profile: Mapping[str, Any]
    """Rows by split, and their format."""


def dataset_record(facts: Facts, data: Data) -> DatasetRecord:
    """What an arm is trained on."""
    paths = tuple(source.path for source in sources(data.train))
    profile = {"format": facts.data_format, "rows": facts.rows, "dropped": facts.dropped}
    return DatasetRecord(facts.data_source, facts.data_digest, paths, profile)


@dataclass(frozen=True)
class StudyRecord:
    """The parent run."""

    experiment: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    objective: Objective


@dataclass(frozen=True)
class TrialRecord:
    """A child run; `key` ("lora/0007") is its identity across attempts and restarts."""

    key: str
    folder: TrialFolder
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: DatasetRecord | None = None
    """Known once the data were read."""


@dataclass(frozen=True)
class ModelRecord:
    """An adapter that is worth a place among the models."""

    trial: str
    """"lora/0007"."""
    adapter: Path
    """PEFT's files."""
    step: int
    """At which it was the best."""
    params: Mapping[str, Any]


@dataclass(frozen=True)
class StudyEnd:
    """What the parent run is told when a study ends."""

    status: RunStatus
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the best trial."""
    best: Mapping[str, Any] = field(default_factory=dict)
    """Its name and its parameters."""
    note: str = ""
    """The run's description, in Markdown."""
    artifacts: Sequence[Path] = ()
    """Files, and folders as a whole."""
    dataset: DatasetRecord | None = None
    models: Sequence[ModelRecord] = ()
    """The best adapters, the best one first."""


class Tracker(Protocol):
    """Records runs."""

    def open_study(self, study: StudyRecord) -> None:
        """Create the parent run, or open it again."""

    def start(self, trial: TrialRecord) -> None:
        """Create the child run, or open it again for another attempt."""

    def ship(self, trial: TrialRecord) -> None:
        """Send the trial's spool as it stands; sending a line twice records it once."""

    def end(
        self,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Ship the rest, the artifacts and the final state; does nothing to a run that has one."""

    def close_study(self, end: StudyEnd) -> None:
        """Give the parent run its final state, the answer, and the best adapters as models."""

    def close(self) -> list[str]:
        """Wait for what is under way; say what could not be recorded, one line each."""


class NullTracker:
    """tracking=none."""

    def open_study(self, study: StudyRecord) -> None:
        """See Tracker."""

    def start(self, trial: TrialRecord) -> None:
        """See Tracker."""

    def ship(self, trial: TrialRecord) -> None:
        """See Tracker."""

    def end(
        self,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """See Tracker."""

    def close_study(self, end: StudyEnd) -> None:
        """See Tracker."""

    def close(self) -> list[str]:
        """See Tracker."""
        return []
