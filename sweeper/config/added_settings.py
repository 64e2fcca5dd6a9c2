"""Settings that changed after studies had been stored, with the values that keep the old behaviour.

A new setting that trials depend on gets one line in ADDED_SETTINGS. Stored questions, nights and
trials' configs that lack the key are then read as if they had that value, so studies of the past
are resumed, continued, forked and used. A setting without a line makes them another question.

A setting whose default changes, or which is added with another default than its value in
ADDED_SETTINGS, also gets one line in EARLIER_DEFAULTS. A stored study then keeps its own value.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
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
    "seed_data": None,  # one seed decided both
    "seed_init": None,
    "training.devices_per_trial": 1,
    "training.eval_delay": 0.0,
    "training.fsdp": False,
}
"""Dotted keys, and the values under which nothing changes."""
EARLIER_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "evaluation.look_rows": (None, 500),
    "training.early_stopping_patience": (3,),
    "training.eval_delay": (0.0,),
    "training.eval_steps": (0.1,),
    "training.moving_average_window": (3,),
}
"""Settings whose default has changed, and the defaults of earlier versions in any preset."""
RENAMED_SETTINGS: Mapping[str, str] = {"evaluation.look_rows": "evaluation.max_samples"}
"""Settings and the keys that earlier versions stored them under."""
SET_LATER = ("data.ignore_columns",)
"""Settings that may be set after a study has begun: what they change shows in its data's digests."""
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
    if part not in parts and key in RENAMED_SETTINGS:
        part = f"{part.removesuffix(key)}{RENAMED_SETTINGS[key]}"
    if part not in parts and key in ADDED_SETTINGS:
        return json.dumps(ADDED_SETTINGS[key])
    text = parts.get(part)
    return None if text is None else meaning(key, referenced(text))


def changed_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the parts of a stored question or night that differ from today's."""
    return [
        part
        for part in {**with_names_of_today(before), **now}
        if stored_text(before, part) != _text_now(now, part) and not _may_be_set(before, part)
    ]


def _may_be_set(before: Mapping[str, str], part: str) -> bool:
    """Return True if a part had its default, and may be set in a study that has begun."""
    key = part.rpartition(": ")[2]
    return key in SET_LATER and stored_text(before, part) == json.dumps(ADDED_SETTINGS[key])


def _text_now(now: Mapping[str, str], part: str) -> str | None:
    key = part.rpartition(": ")[2]
    return meaning(key, referenced(now[part])) if part in now else None


def kept_defaults(
    before: Mapping[str, str], now: Mapping[str, str], named: Collection[str]
) -> dict[str, str]:
    """Return the values that a stored study keeps because only their defaults have changed.

    Args:
        before: the stored settings as JSON texts, by key.
        now: today's.
        named: the keys that the user's overrides name, whose values the user wants.
    """
    texts = {key: stored_text(before, key) for key in EARLIER_DEFAULTS if key in now}
    return {
        key: text
        for key, text in texts.items()
        if text is not None
        and key not in named
        and text != referenced(now[key])
        and json.loads(text) in EARLIER_DEFAULTS[key]
    }


def with_names_of_today(parts: Mapping[str, str]) -> dict[str, str]:
    """Return stored parts with the keys of renamed settings as they are today."""
    names = {earlier: key for key, earlier in RENAMED_SETTINGS.items()}
    return {_renamed(part, names): text for part, text in parts.items()}


def _renamed(part: str, names: Mapping[str, str]) -> str:
    key = part.rpartition(": ")[2]
    return f"{part.removesuffix(key)}{names[key]}" if key in names else part


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
