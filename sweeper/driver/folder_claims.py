"""Claim the folders of a study's trials: what is there is continued only if it belongs to the trial.

Whatever contradicts a trial's identity is moved to `set_aside/` in the study's folder and announced. It
is never continued and never deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sweeper.config.compose import read_yaml
from sweeper.config.decisive_settings import accepted_digests, settings_digest
from sweeper.config.settings import TrialSettings, stored_settings
from sweeper.core.errors import ConfigError, StudyError
from sweeper.core.input_digests import InputDigests
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.stored_files import read_object
from sweeper.core.trial_identity import TrialIdentity, read_identity
from sweeper.tracking.tracker import Tracker, TrialRecord


@dataclass(frozen=True)
class FolderClaims:
    """Claims trial folders for one study."""

    folder: StudyFolder
    study: str
    """The study's UUID."""
    tracker: Tracker
    announce: Callable[[str], None]

    def claim(
        self,
        record: TrialRecord,
        settings: TrialSettings,
        inputs: InputDigests,
        also: Collection[TrialSettings] = (),
    ) -> TrialIdentity:
        """Set aside what a trial's folder holds of another trial.

        Args:
            record: the trial.
            settings: the trial's settings.
            inputs: the digests that are known of what the trial reads.
            also: other forms of the settings under which the trial may have been stored, for
                instance with the rank that followed from adapter.trainable_parameters.

        Returns:
            The trial's identity, to be stored in the folder before anything else is.

        Raises:
            StudyError: the folder holds another trial's work, and cannot be moved.
        """
        identity = TrialIdentity(
            study=self.study,
            trial=record.key,
            seed=settings.seed,
            settings=settings_digest(settings),
            inputs=inputs.of_training,
        )
        accepted = accepted_digests(settings, *also)
        reasons = contradictions(record.folder, identity, accepted)
        # a fork's link: the original's folder may match in every respect, and must not be trained in
        if record.folder.path.is_symlink() and read_identity(record.folder) is None:
            reasons = reasons or ["a link to a trial of another study"]
        if reasons:
            self._move(record, reasons)
        elif not _has_work(record.folder):
            # a driver may have been killed between a move and its record
            for moved in places_aside(self.folder, record.folder):
                self.tracker.settle_move(record, moved)
        return identity

    def recall(self, record: TrialRecord) -> None:
        """Set aside the folder of a finished trial that another study or trial has written.

        Settings and inputs are compared when the trial is judged: to compute the settings of every
        finished trial would take longer than all else at a start.

        Raises:
            StudyError: the folder cannot be moved.
        """
        if record.folder.path.is_symlink():  # a fork's, which another study has written
            return
        found = read_identity(record.folder)
        if found is not None:
            expected = found.model_copy(update={"study": self.study, "trial": record.key})
            if reasons := expected.contradictions(found):
                self._move(record, reasons)

    def _move(self, record: TrialRecord, reasons: Collection[str]) -> None:
        place, why = record.folder.path, ", ".join(reasons)
        words = f"{record.key}: {place} holds the work of another trial ({why})"
        try:
            moved = set_aside(self.folder, record.folder)
        except OSError as error:
            raise StudyError(
                f"{words}, and cannot be moved to {self.folder.set_aside}: {error}"
            ) from error
        self.tracker.set_aside(record, moved)
        self.announce(f"{words}. Moved to {moved.path}")


def contradictions(
    folder: TrialFolder, identity: TrialIdentity, accepted: Collection[str] = ()
) -> list[str]:
    """Return why the content of a folder does not belong to a trial, or nothing if it may.

    Args:
        folder: the folder, which need not exist.
        identity: the trial's.
        accepted: digests of settings that are as good as the identity's.
    """
    if not _has_work(folder):
        return []
    found = read_identity(folder)
    if found is None:
        try:
            found = _computed_identity(folder)
        except (OSError, ConfigError, ValidationError, json.JSONDecodeError) as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            return [f"its config.yaml cannot be read: {first}"]
    if found.settings in accepted:
        found = found.model_copy(update={"settings": identity.settings})
    return identity.contradictions(found)


def set_aside(study: StudyFolder, trial: TrialFolder) -> TrialFolder:
    """Move a trial's folder, and the losses that were judged on its model, under `set_aside/`.

    Returns:
        The folder's new place.
    """
    place = trial.path.relative_to(study.path)
    target = free_path(_place_aside(study, trial))
    target.parent.mkdir(parents=True, exist_ok=True)
    trial.path.rename(target)
    # Losses were stored by the trial's name alone before format 5 of this folder's names
    for losses in sorted(study.path.glob(f"*/finalists/**/{trial.path.name}_*.json")):
        if losses.relative_to(study.path).parts[0] == place.parts[0]:
            losses.rename(free_path(target / f"judged_{losses.parent.name}_{losses.name}"))
    return TrialFolder(target)


def places_aside(study: StudyFolder, trial: TrialFolder) -> list[TrialFolder]:
    """Return the folders that were moved away from a trial's place."""
    place = _place_aside(study, trial)
    found = [place, *sorted(place.parent.glob(f"{place.name}_[0-9]*"))]
    return [TrialFolder(path) for path in found if path.is_dir()]


def _place_aside(study: StudyFolder, trial: TrialFolder) -> Path:
    return study.set_aside / "trials" / trial.path.relative_to(study.path)


def free_path(path: Path) -> Path:
    """Return a path, or the first of PATH_2, PATH_3, … that does not exist."""
    found, number = path, 1
    # a link that leads nowhere does not exist to `exists`, but occupies the name
    while found.exists() or found.is_symlink():
        number += 1
        found = path.with_name(f"{path.name}_{number}")
    return found


def _has_work(folder: TrialFolder) -> bool:
    """Return True if a folder holds anything that a trial could continue or take for its own."""
    kept = (folder.outcome, folder.metrics, folder.checkpoints, folder.config)
    return folder.artifact is not None or any(path.exists() for path in kept)


def _computed_identity(folder: TrialFolder) -> TrialIdentity:
    """Return what an older version's config.yaml and provenance.json say about a folder.

    Raises:
        OSError: config.yaml is missing.
        ConfigError: this version does not understand config.yaml.
    """
    settings = stored_settings(read_yaml(folder.config))
    origin = read_object(folder.provenance, "its data and base model count as unknown")
    return TrialIdentity(
        study=None,
        trial=None,
        seed=settings.seed,
        settings=settings_digest(settings),
        inputs=InputDigests(data=origin.get("data.digest"), base=origin.get("base.digest")),
    )
