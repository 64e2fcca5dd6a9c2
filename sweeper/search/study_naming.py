"""The name of a study whose command line gives none: experiment, model and data file.

A user's own model and data ask another question than the experiment alone, so they get a study of
their own. The name holds no folder, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper.config import compose
from sweeper.config.settings import RunSettings, sources, validate
from sweeper.core.errors import ConfigError
from sweeper.core.paths import StudyFolder
from sweeper.core.references import referenced

KEY = "hydra.sweeper.study_name"
MAX_LENGTH = 100
"""Longest study_name."""
DIGEST_LENGTH = 8
"""Characters of the digest that shortens a long name: 32 bits, so names hardly ever collide."""
_FORMATS = re.compile(r"\.(jsonl|json|csv|tsv|parquet|arrow|txt|md)(\.(gz|bz2|xz|zst))?$")


@dataclass(frozen=True)
class StudyNaming:
    """A study's name, and where it comes from."""

    name: str
    note: str = ""
    """Sentence about a name that the command line does not give, or "" for the experiment's own."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides that make a recorded command reach the same study anywhere."""
        return (f"{KEY}={self.name}",) if self.note else ()


def name_study(overrides: Sequence[str], composition: compose.Composition) -> StudyNaming:
    """Return the name of the study that valid overrides without sweeps ask for."""
    own = str(composition.sweeper["study_name"])
    if KEY in map(compose.key_of, overrides):
        return StudyNaming(own)
    settings = validate(RunSettings, composition.config)
    parts = _own_parts(overrides, settings)
    if not parts:
        return StudyNaming(own)
    if _holds(StudyFolder(Path(settings.output_dir) / own), settings):
        return StudyNaming(own, f"study_name={own}: its trials have this model and this data")
    name = _bounded("_".join([own, *parts]))
    return StudyNaming(name, f"study_name={name}: named after experiment, model and data")


def _own_parts(overrides: Sequence[str], settings: RunSettings) -> list[str]:
    """Return words for the model and the data where they are not the experiment's."""
    kept = [
        # a stand-in belongs to its experiment: it is not the user's own model or data
        text
        for text in overrides
        if compose.key_of(text) in ("experiment", "stand_in", "hydra.searchpath")
    ]
    base_model, train = (
        settings.model.base_model,
        [one.path for one in sources(settings.data.train)],
    )
    try:
        alone = compose.compose(kept).config
    except ConfigError:  # an experiment that needs overrides, say for its data
        return [model_word(base_model), data_word(train)]
    parts: list[str] = []
    if base_model != alone["model"]["base_model"]:
        parts.append(model_word(base_model))
    if train != _paths(alone["data"]["train"]):
        parts.append(data_word(train))
    return parts


def model_word(base_model: str) -> str:
    """Return the word for a base model: the last part of its hub id or folder."""
    return _word(_last_part(referenced(base_model)))


def data_word(paths: Sequence[str]) -> str:
    """Return the word for training data: the stem of the first file, and how many others there are."""
    first = _word(_FORMATS.sub("", _last_part(referenced(paths[0]))))
    return first if len(paths) == 1 else f"{first}-and-{len(paths) - 1}"


def _paths(train: Any) -> list[str]:
    """Return the paths of composed sources, however they were written."""
    items = train if isinstance(train, list) else [train]
    return [str(item["path"] if isinstance(item, dict) else item) for item in items]


def _last_part(text: str) -> str:
    bare = text.partition("?")[0] if "://" in text else text
    return re.split(r"[/\\:]", bare.rstrip("/\\"))[-1]


def _word(text: str) -> str:
    """Return a text in the characters of a study_name."""
    word = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    # a name in another script would vanish, and two of them would be one
    return word if text.isascii() and word else "-".join(filter(None, [word, _digest(text)]))


def _bounded(name: str) -> str:
    if len(name) <= MAX_LENGTH:
        return name
    return f"{name[: MAX_LENGTH - DIGEST_LENGTH - 1]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def _holds(folder: StudyFolder, settings: RunSettings) -> bool:
    """Return True if the trials of a study were trained from this model on these data."""
    config = next(iter(sorted(folder.path.glob("*/trial_*/config.yaml"))), None)
    if config is None:
        return False
    try:
        stored = compose.read_yaml(config)
        base, train = stored["model"]["base_model"], _paths(stored["data"]["train"])
    except (ConfigError, OSError, KeyError, TypeError):
        return False
    asked = [source.path for source in sources(settings.data.train)]
    # not strict: other numbers of sources are compared below
    pairs = [(base, settings.model.base_model), *zip(train, asked, strict=False)]
    return len(train) == len(asked) and all(_same(*pair) for pair in pairs)


def _same(stored: str, given: str) -> bool:
    """Return True for one name, or for two spellings of one path."""
    return stored == given or (
        Path(given).exists() and Path(stored).resolve() == Path(given).resolve()
    )
