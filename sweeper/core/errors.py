"""Every error that a user can meet. Foreign errors become one of these where they enter.

SweeperError
├── ConfigError        a setting, key, group or search space is wrong (exit 2)
├── DataError          a data file cannot be read as what it claims to be
├── ModelError         the base model cannot be loaded, or the adapter does not fit it
│   └── DoesNotFit     a training is larger than the device
├── StudyError         the study cannot be opened, resumed or found
│   ├── StudyLocked    another driver runs it
│   └── StudyMismatch  its name stands for a different question
├── Refused            a command to a running study cannot be obeyed (exit 2)
├── TrialFailed        a single trial ended without a result
├── ArtifactError      stored weights are not what their manifest says
├── TrackingError      MLflow does not answer, or has no such run or model
├── WorkerError        workers cannot be started
└── Diverged           the loss or the gradient is not finite, or far off (a trial's outcome)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweeper.core.outcome import MemoryShortfall


class SweeperError(Exception):
    """Base of all: its message is written for the user and is printed without a traceback."""

    exit_code = 1


class ConfigError(SweeperError):
    """All that is wrong with a configuration, at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head} in the configuration:", *self._items()]))

    def _items(self) -> list[str]:
        return ["  - " + problem.replace("\n", "\n    ") for problem in self.problems]


class DataError(SweeperError):
    """A data file cannot be read as what it claims to be."""


class ModelError(SweeperError):
    """The base model cannot be loaded, or the adapter does not fit it."""


class DoesNotFit(ModelError):
    """A training is larger than the device, whatever its batch; `misfit` says by how much."""

    def __init__(self, misfit: MemoryShortfall) -> None:
        self.misfit = misfit
        super().__init__(f"it does not fit: {misfit}")


class StudyError(SweeperError):
    """The study cannot be opened, resumed or found."""


class StudyLocked(StudyError):
    """Another driver runs this study."""


class StudyMismatch(StudyError):
    """The study of this name answers a different question."""


class CommandRefused(SweeperError):
    """A command to a running study cannot be obeyed as it was given."""

    exit_code = 2


class TrialFailed(SweeperError):
    """A single trial ended without a result (in a study that is an outcome, not an error)."""


class ArtifactError(SweeperError):
    """Stored weights are not what their manifest says."""


class TrackingError(SweeperError):
    """MLflow does not answer, or has no such run or model."""


class WorkerError(SweeperError):
    """Workers cannot be started, or die before they can do anything."""


class TrialDiverged(SweeperError):
    """The loss or the gradient norm is no longer finite, or the loss is far off for good."""
