"""Messages about values that may have several types."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
from pydantic import Field, ValidationError

from sweeper.config.data_settings import DataSettings
from sweeper.config.evaluation_settings import EvaluationSettings
from sweeper.config.model_settings import LoraAdapter
from sweeper.config.section import SettingsSection
from sweeper.config.training_settings import TrainingSettings
from sweeper.config.validation import describe

SECTIONS = (DataSettings, EvaluationSettings, LoraAdapter, TrainingSettings)


class Wrong:
    """A value that no setting has."""


def _unions(section: type[SettingsSection]) -> list[str]:
    return [
        name
        for name, field in section.model_fields.items()
        if get_origin(field.annotation) in (Union, UnionType)
        and len([each for each in get_args(field.annotation) if each is not NoneType]) > 1
    ]


FIELDS = [(section, name) for section in SECTIONS for name in _unions(section)]


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=str)
def test_a_wrong_value_of_several_types_is_one_line(
    section: type[SettingsSection], name: str
) -> None:
    """The line names the key as the user writes it, never the name of a type within pydantic."""
    with pytest.raises(ValidationError) as caught:
        section.model_validate({name: Wrong()})
    lines = [
        line
        for line in describe(caught.value, section)
        if line.startswith((f"{name}=", f"{name}:", f"{name}."))
    ]
    assert len(lines) == 1
    assert lines[0].startswith((f"{name}=", f"{name}:"))


class Workers(SettingsSection):
    """A section with one setting of two types."""

    jobs: Annotated[int, Field(ge=1)] | Literal["auto"]


def test_all_valid_types_are_named() -> None:
    """Each member's rule is in the line, joined by `or`."""
    with pytest.raises(ValidationError) as caught:
        Workers.model_validate({"jobs": "many"})
    (line,) = describe(caught.value, Workers)
    assert line.startswith("jobs='many': input should be a valid integer")
    assert line.endswith(", or 'auto'")
