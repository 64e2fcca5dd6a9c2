"""What the driver tells a tracker: one parent run a study, one child run a trial.

No call waits for a network: a tracker writes down and ships in its own thread. What it could not
record it says at the end; `sweeper sync` records it later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sweeper.config.settings import DataSettings, Objective, sources
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import TrialFolder
from sweeper.core.value import FrozenValue

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""MLflow's final states; KILLED is what it shows for a pruned trial."""


RUN_PARAMS = (
    *("model.base_model", "model.revision", "data.train", "data.template", "data.train_on"),
    *("data.max_length", "data.over_length", "data.packing"),
    *("quantization.load_in_4bit", "quantization.load_in_8bit", "quantization.bnb_4bit_quant_type"),
    *("adapter.method", "adapter.r", "adapter.alpha_over_r", "adapter.lora_alpha"),
    *("adapter.lora_dropout", "adapter.target_modules", "adapter.use_rslora", "adapter.use_dora"),
    *("training.learning_rate", "training.lr_scheduler_type", "training.optim"),
    *("training.warmup_ratio", "training.warmup_steps", "training.weight_decay"),
    *("training.num_train_epochs", "training.max_steps", "training.per_device_train_batch_size"),
    *("training.gradient_accumulation_steps", "objective.metric", "objective.direction", "seed"),
)
"""What runs are compared by, in every run under the same name; the rest is in its config.yaml."""


class DatasetRecord(FrozenValue):
    """The data of a run, as MLflow's input: one digest over all splits."""

    name: str
    digest: str
    sources: tuple[str, ...]
    """Files, folders, URLs and hub ids, as they were written."""
    profile: dict[str, Any]
    """Rows by split, and their format."""


def dataset_record(facts: ArmBaseline, data: DataSettings) -> DatasetRecord:
    """What an arm is trained on."""
    return DatasetRecord(
        name=facts.data_source,
        digest=facts.data_digest,
        sources=tuple(source.path for source in sources(data.train)),
        profile={"format": facts.data_format, "rows": facts.rows, "dropped": facts.dropped},
    )


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

    def keep(self, folders: Sequence[TrialFolder]) -> None:
        """Upload the weights of these trials; of the others only the figures are recorded."""

    def amend(self, trial: TrialRecord, metrics: Mapping[str, float], measured_at: float) -> None:
        """Add figures measured after a trial's end (Unix seconds); sent twice, they are there once."""

    def close_study(
        self,
        status: RunStatus,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        note: str,
        artifacts: Sequence[Path],
    ) -> None:
        """Give the parent run its final state, the answer and the best trial's figures."""

    def close(self, *, hurry: bool = False) -> list[str]:
        """Wait for what is under way; say what could not be recorded, one line each.

        `hurry`: somebody waits for this process to end, so wait for seconds only.
        """


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

    def keep(self, folders: Sequence[TrialFolder]) -> None:
        """See Tracker."""

    def amend(self, trial: TrialRecord, metrics: Mapping[str, float], measured_at: float) -> None:
        """See Tracker."""

    def close_study(
        self,
        status: RunStatus,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        note: str,
        artifacts: Sequence[Path],
    ) -> None:
        """See Tracker."""

    def close(self, *, hurry: bool = False) -> list[str]:
        """See Tracker."""
        return []
