"""The interface between driver and tracker: one parent run per study, one child run per trial.

No call waits for a network, because a tracker writes entries to disk and ships them in its own thread.
At the end it reports what it could not record, and `sweeper sync` records that later.
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
"""MLflow's final states. Pruned trials have the state KILLED."""

# MLflow's tables show parameters in alphabetical order, so with all 76 settings the first columns would
# be adapter.alpha_pattern and adapter.bias
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
"""Settings that are parameters of every run. The run's config.yaml has all settings."""


class DatasetRecord(FrozenValue):
    """The data of a run as MLflow's input, with one digest over all splits."""

    name: str
    digest: str
    sources: tuple[str, ...]
    """Files, folders, URLs and hub ids, as configured."""
    profile: dict[str, Any]
    """Format of the rows, and number of rows by split and of dropped rows by reason."""


def dataset_record(facts: ArmBaseline, data: DataSettings) -> DatasetRecord:
    """Return the record of an arm's training data."""
    return DatasetRecord(
        name=facts.data_source,
        digest=facts.data_digest,
        sources=tuple(source.path for source in sources(data.train)),
        profile={
            "format": facts.data_format,
            "rows": facts.rows,
            "dropped": facts.dropped,
            **({"unread": facts.unread} if facts.unread else {}),
        },
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
    """A child run. `key` ("lora/0007") is its identity across attempts and restarts."""

    key: str
    folder: TrialFolder
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: DatasetRecord | None = None
    """The training data, or None before they are read."""


class Tracker(Protocol):
    """Records the runs of one study."""

    def open_study(self, study: StudyRecord) -> None:
        """Create the parent run, or reopen it."""

    def require_store(self) -> str | None:
        """Wait for the store's answer to the study's run, and return what keeps the store from it.

        A store that is unavailable, or whose credentials are wrong, gets the runs later. None if the
        store has the run.

        Raises:
            TrackingError: the store refuses the run for good. The message names the ways out.
        """

    def start(self, trial: TrialRecord) -> None:
        """Create the child run, or reopen it for another attempt."""

    def ship(self, trial: TrialRecord) -> None:
        """Record the trial's spool so far. A line that is shipped twice is recorded once."""

    def end(
        self,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Record the rest of the spool, the artifacts and the final state, unless they are recorded."""

    def set_aside(self, trial: TrialRecord, moved_to: TrialFolder) -> None:
        """Detach the run of earlier work in the trial's folder, which was moved.

        The trial itself gets a run of its own.
        """

    def settle_move(self, trial: TrialRecord, moved_to: TrialFolder) -> None:
        """Detach the run of a folder that was moved, unless its move was recorded."""

    def keep(self, folders: Sequence[TrialFolder]) -> None:
        """Upload the weights of these trials only. Metrics of all trials are recorded."""

    def amend(self, trial: TrialRecord, metrics: Mapping[str, float], measured_at: float) -> None:
        """Add metrics that were measured after a trial's end, once even if called twice.

        Args:
            trial: the trial.
            metrics: the metrics by name.
            measured_at: time of the measurement in Unix seconds.
        """

    def close_study(
        self,
        status: RunStatus,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        note: str,
        artifacts: Sequence[Path],
    ) -> None:
        """Record the parent run's final state.

        Args:
            status: the final state.
            metrics: the best trial's metrics and the verdict's figures.
            params: the best trial's point, recorded as tags.
            note: the run's description, in Markdown.
            artifacts: files, and folders of files, to upload.
        """

    def keep_ending(self, status: RunStatus) -> None:
        """Restore the parent run's earlier end, because this start ended early and added nothing.

        Args:
            status: the final state if the parent run has no earlier end.
        """

    def close(self, *, hurry: bool = False) -> list[str]:
        """Wait for the shipping, and return one line for each part that could not be recorded.

        Args:
            hurry: True to wait for seconds only, because a user waits for the process to end.
        """


class NullTracker:
    """The tracker of tracking=none, which records nothing."""

    def open_study(self, study: StudyRecord) -> None:
        """Do nothing."""

    def require_store(self) -> str | None:
        """Return None."""
        return None

    def start(self, trial: TrialRecord) -> None:
        """Do nothing."""

    def ship(self, trial: TrialRecord) -> None:
        """Do nothing."""

    def end(
        self,
        trial: TrialRecord,
        status: RunStatus,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Do nothing."""

    def set_aside(self, trial: TrialRecord, moved_to: TrialFolder) -> None:
        """Do nothing."""

    def settle_move(self, trial: TrialRecord, moved_to: TrialFolder) -> None:
        """Do nothing."""

    def keep(self, folders: Sequence[TrialFolder]) -> None:
        """Do nothing."""

    def amend(self, trial: TrialRecord, metrics: Mapping[str, float], measured_at: float) -> None:
        """Do nothing."""

    def close_study(
        self,
        status: RunStatus,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        note: str,
        artifacts: Sequence[Path],
    ) -> None:
        """Do nothing."""

    def keep_ending(self, status: RunStatus) -> None:
        """Do nothing."""

    def close(self, *, hurry: bool = False) -> list[str]:
        """Return no lines."""
        return []
