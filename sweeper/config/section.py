"""Base class and shared types of all settings: strict parsing, step counts, durations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


def _steps(value: object) -> float | Literal["epoch"]:
    """Validate a step count with one message, where pydantic would report every member of the union."""
    if value == "epoch":
        return "epoch"
    number = float(value) if isinstance(value, int | float) else 0.0
    if not isinstance(value, bool) and (0 < number < 1 or (number >= 1 and number.is_integer())):
        return number
    raise ValueError(
        f"{value!r} is neither a whole number of steps, nor a fraction of the schedule below 1, "
        "nor the word epoch"
    )


def _auto_or_bool(value: object) -> bool | Literal["auto"]:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither auto, true nor false")


Steps = Annotated[float | Literal["epoch"], PlainValidator(_steps)]
"""A number of optimizer steps, a fraction of the whole schedule (below 1), or `epoch`."""

AutoBool = Annotated[bool | Literal["auto"], PlainValidator(_auto_or_bool)]


_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: object) -> object:
    """Return the seconds of a duration such as "6h", "1h30m" or "90s". A bare number is refused.

    Raises:
        ValueError: the text is not a duration.
    """
    if text is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", str(text))
    if not parts or "".join(number + unit for number, unit in parts) != str(text):
        raise ValueError(f"{text!r} is no duration. Write it as 6h, 1h30m or 90s")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


Seconds = Annotated[float, Field(gt=0)]


class SettingsSection(BaseModel):
    """Base of every settings section: unknown keys are errors, and values never change."""

    # allow_inf_nan: YAML reads .inf and .nan as numbers, and .inf is above every lower bound
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        deeper = isinstance(value, Mapping) and len(value) > 0
        flat |= flatten(value, f"{name}.") if deeper else {name: value}
    return flat
