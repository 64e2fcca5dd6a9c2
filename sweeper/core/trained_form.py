"""The form in which an artifact was trained, stored with it: template, end tokens, base, precision.

Knows neither models nor tokenizers, so that commands read it without loading either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from sweeper.core.stored_files import read_stored
from sweeper.core.value import FrozenValue

TRAINED_FORM = "trained_form.json"
"""Name of the file in the artifact's folder."""


class TrainedForm(FrozenValue):
    """The facts that a program needs to use an artifact as it was trained."""

    base: str | None
    """Hub id of the base, or None for a base that is on no hub."""
    revision: str | None
    """Commit or revision of the base on the hub."""
    base_digest: str
    """The sha256 of the base's weight files."""
    architecture: str
    """Class of the base, as config.json names it."""
    quantization: str
    """Quantization of the base in the training: none, nf4, fp4 or 8bit."""
    dtype: str
    """Dtype of the forward pass in the training."""
    max_length: int
    """Tokens of the longest row that was trained."""
    template: str | None
    """Name of the prompts' template, or None if no prompts were trained."""
    template_problem: str | None = None
    """Reason why the stored chat template gives other tokens than the training had, or None."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the template (data.chat_template_kwargs)."""
    end_tokens: tuple[str, ...]
    """Tokens that end an answer."""
    tools: bool = False
    """True if functions were offered to the model in the training."""
    data_digest: str
    """The sha256 over the examples of all splits."""

    @property
    def base_words(self) -> str:
        """The base without the name of any local folder."""
        if self.base is None:
            return f"a local base model ({self.architecture}, sha256 {self.base_digest[:12]})"
        return f"{self.base}{f' at revision {self.revision}' if self.revision else ''}"


def read_trained_form(folder: Path) -> TrainedForm | None:
    """Return the form of an artifact, or None for one that an earlier version stored."""
    return read_stored(folder / TRAINED_FORM, TrainedForm, "the settings of the trial are used")
