"""Digests of what a trial reads, by which the driver and its workers agree on data and base model."""

from __future__ import annotations

from collections.abc import Mapping

from sweeper.core.value import FrozenValue

INPUT_NAMES: Mapping[str, str] = {
    "data": "data digest",
    "base": "base model digest",
    "config": "base configuration digest",
    "judged": "judged rows digest",
    "trained": "trained rows digest",
    "test": "test rows digest",
    "general": "general text digest",
}
"""Names of the digests in questions and messages."""


ASKED = ("data", "base", "config", "judged")
"""Digests that are part of a study's question. What is trained on is part of each trial."""


class InputDigests(FrozenValue):
    """The digests (sha256) of a trial's data and base model. None stands for an unknown digest.

    Texts alone do not decide what a model sees: the template, the tokenizer and the length policy do
    as well. So the encoded rows have digests of their own.
    """

    data: str | None = None
    """The texts of all splits, in order."""
    base: str | None = None
    """The base model's weight files."""
    config: str | None = None
    """The base model's configuration (config.json)."""
    judged: str | None = None
    """The encoded rows and prompts of validation, with the settings that decide how they are judged."""
    trained: str | None = None
    """The encoded rows of train, in order."""
    test: str | None = None
    """The encoded rows of the test split."""
    general: str | None = None
    """The windows of general text."""

    @property
    def of_training(self) -> InputDigests:
        """The digests of what a training follows from. Held-out texts are read after it."""
        return self.model_copy(update={"test": None, "general": None})

    def updated(self, found: InputDigests) -> InputDigests:
        """Return these digests with those that are known in `found` in their place."""
        known = {name: text for name in INPUT_NAMES if (text := getattr(found, name)) is not None}
        return self.model_copy(update=known)

    def differences(self, found: InputDigests) -> dict[str, tuple[str, str]]:
        """Return the digests that are known here and in `found` and differ, as pairs by field."""
        return {
            name: (mine, other)
            for name in INPUT_NAMES
            if (mine := getattr(self, name)) is not None
            and (other := getattr(found, name)) is not None
            and mine != other
        }
