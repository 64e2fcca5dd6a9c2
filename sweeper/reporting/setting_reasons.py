"""Why the winner has each of its settings: what was searched, and what conf/ says of its defaults.

A default's reason stands beside it, as `# why:`; it is told only where the winner has that very value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sweeper.config.compose import conf_dir
from sweeper.reporting.results import ArmResult, TrialResult
from sweeper.reporting.study_progress import format_scalar
from sweeper.reporting.text_table import TextTable
from sweeper.reporting.verdict import label
from sweeper.tracking.tracker import RUN_PARAMS

DEFAULT = re.compile(r"^(?P<key>\w+): +(?P<value>[^#]*?) *(?:# ?(?P<comment>.*))?$")
GOES_ON = re.compile(r"^ +# ?(?P<comment>.*)$")
WHY = "why: "
SET = "set by the experiment or on the command line"
WORDS = {True: "true", False: "false", None: "null"}
MOST_VALUES = 6
"""Of a searched choice that are named."""


@dataclass(frozen=True)
class DefaultReason:
    """A value that a file of conf/ gives to a key, and its reason."""

    choice: str
    """"training=tiny"."""
    value: str
    why: str | None


def reason_sheet(arm: ArmResult, importances: Mapping[str, float]) -> TextTable | None:
    """One row a setting of the arm's winner; None without one.

    Args:
        arm: with its trials.
        importances: how much each searched key decides, where that is known.
    """
    if arm.best is None:
        return None
    rows = [
        *(_searched(arm, arm.best, key, importances) for key in arm.best.params),
        *_fixed(arm, arm.best),
    ]
    columns = ("setting", "value", "why")
    return TextTable(f"{label(arm)}: why these settings", columns, tuple(rows), frozenset(columns))


@cache
def defaults() -> dict[str, tuple[DefaultReason, ...]]:
    """What the files of conf/ give to each key."""
    found: dict[str, list[DefaultReason]] = {}
    for path in sorted(conf_dir().glob("*/*.yaml")):
        for key, default in _defaults_in(path):
            found.setdefault(key, []).append(default)
    return {key: tuple(each) for key, each in found.items()}


def _searched(
    arm: ArmResult, best: TrialResult, key: str, importances: Mapping[str, float]
) -> tuple[str, str, str]:
    ranged = arm.ranges.get(key)
    if ranged is not None and ranged.continuous:
        words = f"searched from {ranged.values[0]:.3g} to {ranged.values[-1]:.3g}"
    else:
        tried = dict.fromkeys(format_scalar(t.params[key]) for t in arm.trials if key in t.params)
        listed = ", ".join(sorted(tried)[:MOST_VALUES]) + ", …" * (len(tried) > MOST_VALUES)
        words = f"searched; tried: {listed}"
    if key in importances:
        words += f"; decides {importances[key]:.0%} of being among the best"
    return key, format_scalar(best.params[key]), words


def _fixed(arm: ArmResult, best: TrialResult) -> Iterator[tuple[str, str, str]]:
    """Settings that a reason is known of, or that are no default."""
    for key in RUN_PARAMS:
        value = arm.trained_with.get(key)
        if key in best.params or value is None:
            continue
        known = [found for found in defaults().get(key, ()) if _same(found.value, value)]
        if not known:
            yield key, _shown(value), SET
        elif told := next((found for found in known if found.why), None):
            yield key, _shown(value), f"default of {told.choice}: {told.why}"


def _defaults_in(path: Path) -> Iterator[tuple[str, DefaultReason]]:
    """The settings at a file's top level, each with the reason in its comment, however long."""
    group, choice = path.parent.name, f"{path.parent.name}={path.stem}"
    current: tuple[str, str, list[str]] | None = None
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        # only below a value with a comment: what follows a mapping's key is about its own keys
        if current is not None and all(current) and (more := GOES_ON.match(line)):
            current[2].append(more["comment"])
            continue
        if current is not None:
            key, value, comments = current
            yield f"{group}.{key}", DefaultReason(choice, value, _why(comments))
        found = DEFAULT.match(line)
        told = [found["comment"]] if found is not None and found["comment"] else []
        current = None if found is None else (found["key"], found["value"], told)


def _why(comments: list[str]) -> str | None:
    text = " ".join(comment.strip() for comment in comments)
    return text.partition(WHY)[2].strip() or None if WHY in text else None


def _same(written: str, value: Any) -> bool:
    """Whether a YAML scalar is this value; 5e-3 is 0.005."""
    if isinstance(value, bool) or value is None:
        return written == WORDS[value]
    if isinstance(value, int | float):
        try:
            return float(written) == value
        except ValueError:
            return False
    return written.strip("'\"") == str(value)


def _shown(value: Any) -> str:
    return WORDS[value] if isinstance(value, bool) else format_scalar(value)
