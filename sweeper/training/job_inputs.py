"""Compare the inputs that a job expects with those it has loaded: digests of data and base model.

A worker loads files that may have changed since the study was probed. Loads neither models nor tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sweeper.config.input_sources import OF_THE_TEXTS, require_same, unreadable
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import ConfigError, DataError, ModelError
from sweeper.core.input_digests import InputDigests
from sweeper.data.splits import load_splits
from sweeper.modeling.model_source import read_base_files


@dataclass
class JobInputs:
    """Compares what is loaded for one job with the digests that the job carries."""

    expected: InputDigests = field(default_factory=InputDigests)
    found: InputDigests = field(default_factory=InputDigests)
    """Digests of what was loaded so far."""

    @property
    def checked(self) -> bool:
        """True if the job expects anything."""
        return self.expected != InputDigests()

    def note(self, settings: TrialSettings, found: InputDigests) -> None:
        """Record what was loaded.

        Raises:
            InputsChanged: the job does not expect it.
        """
        self.found = self.found.updated(found)
        require_same(self.expected, found, settings)

    def require_loaded_files(self, settings: TrialSettings) -> None:
        """Refuse a base model whose files are no longer those that were loaded.

        Raises:
            InputsChanged: they differ, or cannot be read.
        """
        self.expected = self.expected.updated(self.found)
        self.require_base_files(settings)

    def require_base_files(self, settings: TrialSettings) -> None:
        """Refuse a base model whose files are not those that the job expects.

        Called where the base cannot be loaded, which is no fault of a trial on these files.

        Raises:
            InputsChanged: they differ, or cannot be read.
        """
        if self.expected.base is None:
            return
        try:
            found = read_base_files(settings.model)
        except ModelError as error:
            raise unreadable(self.expected, ["base"], settings, error) from error
        require_same(self.expected, found, settings)

    def require_data(self, settings: TrialSettings, problem: DataError | ConfigError) -> None:
        """Refuse data that cannot be prepared although the job expects them.

        Raises:
            InputsChanged: they differ, or cannot be read or encoded any more.
        """
        if self.expected.judged is not None:  # this model has encoded these data before
            names = ["data", *OF_THE_TEXTS]
            raise unreadable(self.expected, names, settings, problem) from problem
        if self.expected.data is None:
            return
        try:
            found = load_splits(settings.data).digest
        except DataError as error:
            raise unreadable(self.expected, ["data"], settings, error) from error
        require_same(self.expected, InputDigests(data=found), settings)

    def require_general(self, settings: TrialSettings, problem: DataError) -> None:
        """Refuse general text that cannot be read although the job expects it.

        Raises:
            InputsChanged: the job expects it.
        """
        if self.expected.general is not None:
            raise unreadable(self.expected, ["general"], settings, problem) from problem
