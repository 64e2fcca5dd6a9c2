"""Reasons for the winner's settings: the range that was searched, or the default's comment in conf/.

A default's reason is the comment `# why:` after its value in conf/. It is shown only if the winner has
exactly that value.
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
from sweeper.reporting.verdict_doubts import label
from sweeper.tracking.tracker import RUN_PARAMS

DEFAULT = re.compile(r"^(?P<key>\w+): +(?P<value>[^#]*?) *(?:# ?(?P<comment>.*))?$")
CONTINUATION = re.compile(r"^ +# ?(?P<comment>.*)$")
WHY = "why: "
SET = "set by the experiment or on the command line"
WORDS = {True: "true", False: "false", None: "null"}
MOST_VALUES = 6
"""Tried values of a searched choice that are named."""


@dataclass(frozen=True)
class DefaultReason:
    """A default value from a file of conf/, with its reason."""

    choice: str
    """Group and file, such as "training=tiny"."""
    value: str
    why: str | None
    """Text after `# why:`, or None without such a comment."""


def reason_sheet(arm: ArmResult, importances: Mapping[str, float]) -> TextTable | None:
    """Return one row per setting of the arm's winner, or None if the arm has no winner.

    Args:
        arm: the arm with its trials.
        importances: share that each searched key has in being among the best trials, if known.
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
    """Return the default values of each key in the files of conf/."""
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
        words = f"searched, values tried: {listed}"
    if key in importances:
        words += f" (importance {importances[key]:.0%})"
    return key, format_scalar(best.params[key]), words


def _fixed(arm: ArmResult, best: TrialResult) -> Iterator[tuple[str, str, str]]:
    """Yield fixed settings with a documented default or a value that is no default."""
    # These keys are the ones that runs in MLflow show, so page and tracking agree.
    for key in RUN_PARAMS:
        value = arm.trained_with.get(key)
        if key in best.params or value is None:
            continue
        # A value that no file of conf/ gives was set by the experiment or by the user.
        known = [found for found in defaults().get(key, ()) if _same(found.value, value)]
        if not known:
            yield key, _shown(value), SET
        elif documented := next((found for found in known if found.why), None):
            yield key, _shown(value), f"default of {documented.choice}: {documented.why}"


def _defaults_in(path: Path) -> Iterator[tuple[str, DefaultReason]]:
    """Yield the settings at a file's top level, each with the reason in its comment lines."""
    group, choice = path.parent.name, f"{path.parent.name}={path.stem}"
    current: tuple[str, str, list[str]] | None = None
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        # a comment after a mapping's key describes the keys below it, so it continues no reason
        if current is not None and all(current) and (more := CONTINUATION.match(line)):
            current[2].append(more["comment"])
            continue
        if current is not None:
            key, value, comments = current
            yield f"{group}.{key}", DefaultReason(choice, value, _reason(comments))
        found = DEFAULT.match(line)
        comments = [found["comment"]] if found is not None and found["comment"] else []
        current = None if found is None else (found["key"], found["value"], comments)


def _reason(comments: list[str]) -> str | None:
    text = " ".join(comment.strip() for comment in comments)
    return text.partition(WHY)[2].strip() or None if WHY in text else None


def _same(written: str, value: Any) -> bool:
    """Return True if a YAML scalar denotes this value: 5e-3 equals 0.005."""
    # bool comes first, because True == 1 in Python.
    if isinstance(value, bool) or value is None:
        return written == WORDS[value]
    if isinstance(value, int | float):
        try:
            # YAML 1.1 reads 5e-3 as text, so numbers are compared as floats.
            return float(written) == value
        except ValueError:
            return False
    return written.strip("'\"") == str(value)


def _shown(value: Any) -> str:
    return WORDS[value] if isinstance(value, bool) else format_scalar(value)
