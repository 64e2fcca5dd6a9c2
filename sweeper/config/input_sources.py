"""The settings that name what a trial reads, and the comparison of its digests with those expected.

The driver knows the digests from an arm's probe. A worker compares what it loads with them, because a
file can change between two loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from sweeper.config.section import flatten
from sweeper.config.trial_settings import TrialSettings
from sweeper.core.errors import InputsChanged
from sweeper.core.input_digests import INPUT_NAMES, InputDigests
from sweeper.core.outcome import ArmBaseline

ENCODED = ("data.template", "model.base_model")
"""Settings that decide how texts become tokens. The tokenizer lies in the base model's folder."""
SOURCES: Mapping[str, tuple[str, ...]] = {
    "data": ("data.train", "data.validation", "data.test"),
    "base": ("model.base_model",),
    "config": ("model.base_model",),
    "judged": (*ENCODED, "evaluation.metrics"),
    "trained": ENCODED,
    "test": ENCODED,
    "general": ("evaluation.general_text.source", "model.base_model"),
}
"""Settings that name the files behind each digest."""
OF_THE_TEXTS = ("judged", "trained", "test", "general")
"""Digests that change with the data's."""


def expected_inputs(
    facts: ArmBaseline, probed: TrialSettings, settings: TrialSettings
) -> InputDigests:
    """Return the digests that a trial must find again, out of those that a probe has found.

    Args:
        facts: the facts of the probe.
        probed: the settings of the probe.
        settings: the trial's settings. What they name differently has an unknown digest.
    """
    found, unknown = facts.inputs, set[str]()
    if settings.data != probed.data:
        unknown |= {"data", *OF_THE_TEXTS}
    if _files(settings) != _files(probed):
        unknown |= {"base", "config", *OF_THE_TEXTS}
    if settings.evaluation != probed.evaluation:
        unknown |= {"judged", "general"}
    return found.model_copy(update=dict.fromkeys(unknown))


def _files(settings: TrialSettings) -> tuple[str, str | None]:
    return settings.model.base_model, settings.model.revision


def require_same(expected: InputDigests, found: InputDigests, settings: TrialSettings) -> None:
    """Refuse what was read if it differs from what is expected.

    Raises:
        InputsChanged: names both digests and the settings that name the files.
    """
    if lines := describe_changes(expected, found, settings):
        raise InputsChanged("\n".join(lines))


def describe_changes(
    expected: InputDigests, found: InputDigests, settings: TrialSettings
) -> list[str]:
    """Return a line for each digest that differs."""
    different = expected.differences(found)
    if "data" in different:  # other texts have other tokens, which need no lines of their own
        different = {name: pair for name, pair in different.items() if name not in OF_THE_TEXTS}
    return [
        f"    {INPUT_NAMES[name]}: {then} then, {now} now{named_by((name,), settings)}"
        for name, (then, now) in different.items()
    ]


def unreadable(
    expected: InputDigests, names: Iterable[str], settings: TrialSettings, error: Exception
) -> InputsChanged:
    """Return the error about inputs that are expected and can no longer be loaded."""
    known = [name for name in names if getattr(expected, name) is not None]
    lines = [
        f"    {INPUT_NAMES[name]}: {getattr(expected, name)} then, unreadable now"
        f"{named_by((name,), settings)}"
        for name in known
    ]
    return InputsChanged("\n".join([*lines, f"    {error}"]))


def named_by(names: Iterable[str], settings: TrialSettings) -> str:
    """Return the settings behind digests in brackets, as overrides."""
    # A source may be a mapping or a list, so the sections are looked up before they are flattened.
    sections = {
        key: value
        for name, value in settings.model_dump(mode="json").items()
        for key, value in _with_sections(name, value)
    }
    keys = dict.fromkeys(key for name in names for key in SOURCES[name])
    words = [f"{key}={_text(sections[key])}" for key in keys if sections.get(key)]
    return f" ({', '.join(words)})" if words else ""


def _with_sections(name: str, value: object) -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [(f"{name}.{key}", each) for key, each in value.items()] + [
        (f"{name}.{key}", each) for key, each in flatten(value).items()
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
