"""Settings that were added after studies had been stored, with the value that keeps the old behaviour.

A new setting that trials depend on gets one line in ADDED_SETTINGS. Stored questions, nights and
trials' configs that lack the key are then read as if they had that value, so studies of the past
are resumed, continued, forked and used. A setting without a line makes them another question.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sweeper.config.trial_settings import TrialSettings
from sweeper.config.validation import TAGS, validate
from sweeper.core.references import referenced

ADDED_SETTINGS: Mapping[str, Any] = {
    "adapter.trainable_parameters": None,  # the rank was always given
    "data.chat_template_kwargs": {},
    "data.control_tokens": "auto",
    "data.ignore_columns": [],
    "data.train_history": False,
    "evaluation.over_length": "refuse",
    "evaluation.serve_as": "trained",
    "training.devices_per_trial": 1,
    "training.fsdp": False,
}
"""Dotted keys, and the values under which nothing changes."""
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    # Studies of the past name sdpa, and ran only where the class has it. There, auto is sdpa
    "model.attn_implementation": {'"auto"': '"sdpa"'},
}
"""JSON texts of values that became defaults later, by dotted key, and their equals."""


def meaning(key: str, text: str) -> str:
    """Return the JSON text of a setting under which studies of every version are compared."""
    return RENAMED_VALUES.get(key, {}).get(text, text)


def stored_text(parts: Mapping[str, str], part: str) -> str | None:
    """Return a part of a stored question or night, as JSON text where it is a setting.

    Args:
        parts: stored texts by part; in a night's, `ARM: ` stands before each setting's key.
        part: the part to look up.

    Returns:
        The stored text, the text of the value in ADDED_SETTINGS where the part is absent, or None.
    """
    key = part.rpartition(": ")[2]
    if part not in parts and key in ADDED_SETTINGS:
        return json.dumps(ADDED_SETTINGS[key])
    text = parts.get(part)
    return None if text is None else meaning(key, referenced(text))


def changed_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the parts of a stored question or night that differ from today's."""
    return [part for part in {**before, **now} if stored_text(before, part) != _text_now(now, part)]


def _text_now(now: Mapping[str, str], part: str) -> str | None:
    key = part.rpartition(": ")[2]
    return meaning(key, referenced(now[part])) if part in now else None


def stored_settings(config: Mapping[str, Any]) -> TrialSettings:
    """Return the settings of a stored config.yaml, whichever version wrote it.

    Raises:
        ConfigError: names every key that this version does not know or cannot do without.
    """
    kept = {key: value for key, value in config.items() if key in TrialSettings.model_fields}
    return validate(TrialSettings, _with_added(kept))


def _with_added(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the missing keys that ADDED_SETTINGS names. pydantic's errors say which ones are
    missing.
    """
    try:
        TrialSettings.model_validate(config)
    except ValidationError as error:
        filled = copy.deepcopy(config)
        for problem in error.errors(include_url=False):
            path = [str(name) for name in problem["loc"] if name not in TAGS]
            if problem["type"] == "missing" and (key := ".".join(path)) in ADDED_SETTINGS:
                section = filled
                for name in path[:-1]:
                    section = section[name]
                section[path[-1]] = ADDED_SETTINGS[key]
        return filled
    return config
