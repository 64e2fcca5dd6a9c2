"""Validation of a plain dict into settings, or one error that names every wrong key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from sweeper.config.data_settings import _ONE, _SEVERAL, _SOURCE, DataSource
from sweeper.config.model_settings import ADAPTER_METHODS
from sweeper.config.section import SettingsSection
from sweeper.core.errors import ConfigError

TAGS: dict[str, type[SettingsSection] | None] = {
    **ADAPTER_METHODS,
    _ONE: None,
    _SEVERAL: None,
    _SOURCE: DataSource,
}
"""Parts of a pydantic error location that name a member of a union, with the member's section."""

# pydantic's words, with the small letter that `_message` gives them
EXPECTED = "input should be "

S = TypeVar("S", bound=SettingsSection)


def validate(kind: type[S], config: Mapping[str, Any], where: str = "") -> S:
    """Validate a plain dict as settings.

    Args:
        kind: the section to build.
        config: the composed values.
        where: the dotted path of `config` itself, for messages.

    Raises:
        ConfigError: names every wrong key with its value and what is allowed.
    """
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        raise ConfigError(describe(error, kind, where)) from None


def describe(error: ValidationError, kind: type[SettingsSection], where: str = "") -> list[str]:
    """Return one line per wrong value: the dotted key, the value, the rule, the valid choices."""
    lines: dict[tuple[str, str], str] = {}
    for item in error.errors(include_url=False):
        key = _key(item, kind, where)
        # A value of several types has an error for each of them
        first = lines.get((key, repr(item["input"])))
        lines[key, repr(item["input"])] = (
            _describe(item, kind, key)
            if first is None
            else f"{first}, or {_message(item).removeprefix(EXPECTED)}"
        )
    return list(lines.values())


def _describe(item: Mapping[str, Any], kind: type[SettingsSection], key: str) -> str:
    location = [str(part) for part in item["loc"]]
    match item["type"]:
        case "extra_forbidden":
            valid = sorted(_section_at(kind, location[:-1]).model_fields)
            close = difflib.get_close_matches(location[-1], valid, n=1)
            meant = f"Did you mean {'.'.join([*key.split('.')[:-1], *close])}? " if close else ""
            return f"{key}={item['input']!r}: no such key. {meant}Valid keys: {', '.join(valid)}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            # pydantic puts these words before a validator's own
            return f"{key}: {str(item['msg']).removeprefix('Value error, ')}"
        case _:
            return f"{key}={item['input']!r}: {_message(item)}"


def _message(item: Mapping[str, Any]) -> str:
    words = str(item["msg"])
    return words[0].lower() + words[1:]


def _key(item: Mapping[str, Any], kind: type[SettingsSection], where: str) -> str:
    """Return the dotted key of an error, without the names that pydantic gives to a union's members."""
    location = [str(part) for part in item["loc"]]
    shown = [
        part
        for place, part in enumerate(location)
        if part not in TAGS and not _names_member(kind, location[:place])
    ]
    return ".".join([where, *shown] if where else shown) or "the configuration"


def _names_member(kind: type[SettingsSection], location: Sequence[str]) -> bool:
    """Return True if the part after a location names the type of a value that may have several."""
    if not location:
        return False
    field = _section_at(kind, location[:-1]).model_fields.get(location[-1])
    if field is None or get_origin(field.annotation) not in (Union, UnionType):
        return False
    return len([each for each in get_args(field.annotation) if each is not NoneType]) > 1


def _section_at(kind: type[SettingsSection], location: Sequence[str]) -> type[SettingsSection]:
    """Return the section at an error's location, where a tag names a union's member."""
    section = kind
    for part in location:
        if part in TAGS:
            section = TAGS[part] or section
        elif part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return section


def _section_in(annotation: Any) -> type[SettingsSection] | None:
    """Return the section of a key: the key's own, or the one that its list or dict contains."""
    kinds = (annotation, *get_args(annotation))
    sections = (
        kind for kind in kinds if isinstance(kind, type) and issubclass(kind, SettingsSection)
    )
    return next(sections, None)
