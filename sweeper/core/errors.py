"""Errors that a user can see. Errors of other libraries are converted where the library is called.

SweeperError
├── ConfigError        a setting, key, group or search space is wrong (exit 2)
├── DataError          a data file cannot be read in its format
├── ModelError         the base model cannot be loaded, or the adapter does not suit it
│   └── DoesNotFit     a training needs more memory than the device has
├── StudyError         the study cannot be opened, resumed or found
│   ├── StudyLocked    another driver is running the study
│   ├── StudyMismatch  the study's name is taken by a study with another configuration
│   └── InputsChanged  data or base model were changed while a run used them
├── CommandRefused     a command to a running study cannot be carried out (exit 2)
├── TrialFailed        a single trial ended without a result
├── ArtifactError      stored weights differ from their manifest
├── TrackingError      MLflow does not answer, or has no such run or model
│   └── AccessRefused  MLflow does not accept the credentials
├── WorkerError        workers cannot be started
└── TrialDiverged      the loss or the gradient is not finite, or far too high (a trial's outcome)
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweeper.core.value import MemoryShortfall


ADVICE: Mapping[int, str] = {
    errno.EACCES: "Ask its owner for the right, or name another folder (output_dir=…, --output-dir)",
    errno.EPERM: "Ask its owner for the right, or name another folder (output_dir=…, --output-dir)",
    errno.EROFS: "Name a folder that can be written (output_dir=…, --output-dir)",
    errno.ENOSPC: "Free space or inodes (df -h, df -i), and run the same command again",
    errno.EDQUOT: "Free space below your quota, and run the same command again",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), and run the same command again",
    errno.EISDIR: "A folder is where a file belongs. Move it away, and run the same command again",
    errno.ENOTDIR: "A file is where a folder belongs. Move it away, and run the same command again",
    errno.EEXIST: "A file is where a folder belongs. Move it away, and run the same command again",
    errno.ELOOP: "A link leads to itself. Remove it, and run the same command again",
    errno.EIO: "The disk cannot be read or written. Look after the disk first",
}
"""What to do about an error of the operating system, by its number."""


class SweeperError(Exception):
    """Base of all errors whose message is for the user and is printed without a traceback."""

    exit_code = 1


class ConfigError(SweeperError):
    """A configuration is wrong. The message lists all of its problems.

    Args:
        problems: One message for each problem, each naming its key and value.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        # All problems at once, so that a user need not run the command once per mistake.
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        items = ["  - " + problem.replace("\n", "\n    ") for problem in self.problems]
        super().__init__("\n".join([f"{head} in the configuration:", *items]))


class DataError(SweeperError):
    """A data file cannot be read in its format, or its rows cannot be used."""


class ModelError(SweeperError):
    """The base model cannot be loaded, or the adapter does not suit the model."""


class DoesNotFit(ModelError):
    """A training needs more memory than the device has, at any batch size.

    Args:
        misfit: Memory needed and memory available.
    """

    def __init__(self, misfit: MemoryShortfall) -> None:
        self.misfit = misfit
        super().__init__(f"the training does not fit: {misfit}")


class StudyError(SweeperError):
    """The study cannot be opened, resumed or found."""


class StudyLocked(StudyError):
    """Another driver is running this study."""


class StudyMismatch(StudyError):
    """The study of this name was started with another configuration."""


class InputsChanged(StudyError):
    """Data or base model differ from those that a job expects, or can no longer be loaded."""


class CommandRefused(SweeperError):
    """A command to a running study cannot be carried out."""

    exit_code = 2


class TrialFailed(SweeperError):
    """A single trial ended without a result. (Inside a study that is an outcome, not an error.)"""


class ArtifactError(SweeperError):
    """Stored weights differ from their manifest."""


class TrackingError(SweeperError):
    """MLflow does not answer, or has no such run or model."""


class AccessRefused(TrackingError):
    """MLflow does not accept the credentials, or asks for some."""


class WorkerError(SweeperError):
    """Workers cannot be started, or die before their first command."""


class TrialDiverged(SweeperError):
    """The loss or the gradient norm is no longer finite, or the loss stays far too high."""


def sentence(error: OSError) -> str:
    """Return what the operating system refused, which file it is about, and what to do."""
    reason = (error.strerror or first_line(error)).lower()
    names = " and ".join(
        str(name) for name in (error.filename, error.filename2) if name is not None
    )
    advice = ADVICE.get(error.errno or 0, "")
    return f"{names or 'the operating system'}: {reason}{advice and f'. {advice}'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
