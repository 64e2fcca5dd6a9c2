"""The identity of a trial's folder: which trial of which study wrote it, from which inputs.

A folder's path says nothing about its content: another storage, a deleted database or another study of
the same name leads to the same path.
"""

from __future__ import annotations

from contextlib import suppress

from sweeper.core.input_digests import INPUT_NAMES, InputDigests
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.core.value import FrozenValue

DIGEST_CHARS = 12
"""Characters of a digest that messages show."""


class TrialIdentity(FrozenValue):
    """The content of identity.json. None stands for what an older version did not store."""

    study: str | None
    """UUID of the study, which its storage holds as well."""
    trial: str | None
    """The trial's key, as in "lora/0007"."""
    seed: int
    settings: str
    """Digest of the settings that decide the result (sweeper.config.decisive_settings)."""
    inputs: InputDigests = InputDigests()
    """Digests of the data and the base model."""

    def contradictions(self, found: TrialIdentity) -> list[str]:
        """Return in which respects another identity differs from this one, as text."""
        named = (
            ("study", self.study, found.study),
            ("trial", self.trial, found.trial),
            ("seed", str(self.seed), str(found.seed)),
            ("settings", self.settings, found.settings),
        )
        pairs = {
            name: (mine, other)
            for name, mine, other in named
            if mine is not None and other is not None and mine != other
        }
        inputs = self.inputs.differences(found.inputs)
        pairs |= {INPUT_NAMES[name]: pair for name, pair in inputs.items()}
        return [
            f"{name} {other[:DIGEST_CHARS]} instead of {mine[:DIGEST_CHARS]}"
            for name, (mine, other) in pairs.items()
        ]


def read_identity(folder: TrialFolder) -> TrialIdentity | None:
    """Return the stored identity of a folder, or None without one that can be read."""
    try:
        return TrialIdentity.model_validate_json(folder.identity.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def write_identity(folder: TrialFolder, identity: TrialIdentity) -> None:
    """Store the identity of a folder, unless the folder has this identity already."""
    if read_identity(folder) != identity:
        # on a full disk the folder is recognised by its config.yaml and provenance.json instead
        with suppress(OSError):
            write_atomic(folder.identity, identity.model_dump_json(indent=2) + "\n")
