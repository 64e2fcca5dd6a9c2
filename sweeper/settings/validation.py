"""A plain dict becomes settings, or one error that names every wrong key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from sweeper.errors import ConfigError
from sweeper.settings.data import _ONE, _SEVERAL, _SOURCE, Source
from sweeper.settings.model import ADAPTER_METHODS
from sweeper.settings.section import Section

TAGS: dict[str, type[Section] | None] = {
    **ADAPTER_METHODS,
    _ONE: None,
    _SEVERAL: None,
    _SOURCE: Source,
}
"""What stands in an error's location for a member of a union, and the section it leads to."""

S = TypeVar("S", bound=Section)


def validate(kind: type[S], config: Mapping[str, Any], where: str = "") -> S:
    """Turn a plain dict into settings.

    Raises:
        ConfigError: names every wrong key with its value and what is allowed; `where` is the dotted
            path of `config` itself.
    """
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        raise ConfigError(describe(error, kind, where)) from None


def describe(error: ValidationError, kind: type[Section], where: str = "") -> list[str]:
    """One line per pydantic error: the dotted key, the rule, the value, the valid choices."""
    return [_describe(item, kind, where) for item in error.errors(include_url=False)]


def _describe(item: Mapping[str, Any], kind: type[Section], where: str) -> str:
    location = [str(part) for part in item["loc"]]
    shown = [part for part in location if part not in TAGS]
    key = ".".join([where, *shown] if where else shown) or "the configuration"
    message = str(item["msg"]).removeprefix("Value error, ")
    match item["type"]:
        case "extra_forbidden":
            valid = ", ".join(sorted(_section_at(kind, location[:-1]).model_fields))
            return f"{key}={item['input']!r}: no such key; valid keys: {valid}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {message}"
        case _:
            return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    """The section an error's location leads to; a union's member is named by its tag."""
    section = kind
    for part in location:
        if part in TAGS:
            section = TAGS[part] or section
        elif part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The section of a key: itself, or what its list or dict holds."""
    kinds = (annotation, *get_args(annotation))
    sections = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
    return next(sections, None)
