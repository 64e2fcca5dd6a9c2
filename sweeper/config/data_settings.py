"""Settings of `data`: sources, their format, cleaning and splits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sweeper.config.section import Positive, SettingsSection

SPLIT_KEYS = ("train", "validation", "test")

EMBEDDED = "embedded"
"""Name of the base model and the data set that ship inside the package."""
FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "oasst",
    "alpaca",
    "chat_completion",
    "prompt_completion",
    "question_answer",
    "flan",
    "ultrachat",
    "text",
    "book",
]
"""`auto`, or a key of sweeper.data.row_formats.FORMATS."""


class DataSource(SettingsSection):
    """One source of rows. A null field takes the value that `data` gives for all sources."""

    path: str = Field(min_length=1)
    split: str | None = None
    """Split of a folder or a hub data set. null: the one named like the key: train, validation, test."""
    name: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in train, relative to the other weights. null everywhere: all rows."""
    format: str | None = None
    columns: dict[str, str] | None = None


_ONE, _SEVERAL, _SOURCE = "one path", "several sources", "a source"


# A tag chooses one member of a union, so that pydantic reports the errors of that member alone.
def _sources_tag(value: object) -> str:
    return _SEVERAL if isinstance(value, list) else _source_tag(value)


def _source_tag(value: object) -> str:
    return _SOURCE if isinstance(value, Mapping | DataSource) else _ONE


OnePath = Annotated[Annotated[str, Field(min_length=1)], Tag(_ONE)]
OneSource = Annotated[OnePath | Annotated[DataSource, Tag(_SOURCE)], Discriminator(_source_tag)]
Sources = Annotated[
    OnePath
    | Annotated[DataSource, Tag(_SOURCE)]
    | Annotated[list[OneSource], Field(min_length=1), Tag(_SEVERAL)],
    Discriminator(_sources_tag),
]
"""A file, a folder, a hub id or a URL, or several of them."""


def sources(given: Sources | None) -> list[DataSource]:
    """Return sources as a tuple, however they were written: one path, one source, or a list of both."""
    items = given if isinstance(given, list) else [] if given is None else [given]
    return [DataSource(path=item) if isinstance(item, str) else item for item in items]


class CleaningSettings(SettingsSection):
    """Rules for the rows that are left out before anything is split."""

    deduplicate: Literal["none", "exact", "near"]
    near_threshold: Annotated[float, Field(ge=0.3, le=0.99)]
    min_completion_chars: Annotated[int, Field(ge=0)]
    max_chars: Positive | None
    low_quality: bool
    completion_pattern: str | None
    completion_json: bool
    redact: list[Literal["email", "phone"]]

    @model_validator(mode="after")
    def _pattern_compiles(self) -> CleaningSettings:
        try:
            re.compile(self.completion_pattern or "")
        except re.error as error:
            raise ValueError(
                f"completion_pattern={self.completion_pattern!r} is no regular expression: {error}"
            ) from None
        return self


class DataSettings(SettingsSection):
    """Settings of the data that a trial trains on and is judged on."""

    train: Sources
    validation: Sources | None
    test: Sources | None
    format: FormatName
    columns: dict[str, str]
    ignore_columns: list[str]
    """Columns that are not read although they may carry meaning."""
    train_history: bool
    template: str = Field(min_length=1)
    chat_template_kwargs: dict[str, Any]
    """Variables for the chat template, as enable_thinking."""
    control_tokens: Literal["auto", "text", "tokens"]
    train_on: Literal["completions", "last_completion", "everything"]
    max_length: Annotated[int, Field(ge=8)] | Literal["auto"]
    over_length: Literal["drop", "truncate"]
    packing: bool
    max_samples: Positive | None
    # Each of the two is below a half, so that rows are left to train on
    validation_ratio: Annotated[float, Field(gt=0, lt=0.5)]
    test_ratio: Annotated[float, Field(ge=0, lt=0.5)]
    split_seed: Annotated[int, Field(ge=0)]
    group_by: str | None
    balance_by: str | None
    order_by: str | None
    max_bad_fraction: Annotated[float, Field(ge=0, lt=1)]
    cleaning: CleaningSettings

    @model_validator(mode="after")
    def _one_mixture(self) -> DataSettings:
        train = sources(self.train)
        weighted = [source.path for source in train if source.weight is not None]
        if weighted and len(weighted) < len(train):
            raise ValueError(
                f"train: only {', '.join(weighted)} has a weight. Weigh every source or none"
            )
        if weighted and self.balance_by is not None:
            raise ValueError(
                f"balance_by={self.balance_by} and the sources' weights both decide how often "
                "rows occur. Set data.balance_by=null or leave the weights out"
            )
        if any(item.weight is not None for item in sources(self.validation) + sources(self.test)):
            raise ValueError("weights are for train. Validation and test are taken as they are")
        return self
