"""Drop training examples that are defective, low in quality or duplicates, and count the reasons.

Every rule is a number or a pattern given in this module. Works on text and does not know tokens.
Redaction replaces text instead of dropping examples, and also applies to validation and test files.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sweeper.config.settings import CleaningSettings
from sweeper.data.duplicates import SeenTexts, normalised
from sweeper.data.examples import DropCounts, Example

STAGE = "clean"

PLACEHOLDERS = frozenset(
    {
        *("n/a", "n.a", "na", "nan", "null", "nil", "undefined", "todo", "tbd", "fixme"),
        *("placeholder", "xxx", "lorem ipsum", "<nooutput>", "<noinput>", "-", "…", "..."),
    }
)
"""Placeholders for a missing answer, as `normalised` returns them, without a trailing full stop."""

JUDGED_CHARS = 20
"""Characters from which the character rules apply. Shorter answers such as `3 + 4` are legitimate."""
MAX_SHARE_OF_ONE_CHARACTER = 0.5
"""Share of one character above which an answer is no text. A judgement: a space is a sixth of
English."""
MIN_SHARE_OF_TEXT = 0.1
"""Minimum share of letters and digits. JSON and tables of numbers have about 0.25."""
JUDGED_LINES = 5
"""Lines from which the rule about repeated lines applies. A judgement: short lists repeat by chance."""
MIN_SHARE_OF_DISTINCT_LINES = 0.5
"""Share of distinct lines below which an answer is a loop. A judgement: code repeats some of its
lines."""

REDACTIONS = {
    "email": (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[EMAIL]"),
    # +49 30 1234567, (030) 1234-567, 555-123-4567: grouped digits only, so that plain numbers
    # are kept
    "phone": (
        re.compile(
            r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(\d+\)[ .-]?)?\d{2,}(?:[ .-]?\d{2,})+"
            r"|\(\d{2,5}\)[ .-]?\d{3,}(?:[ .-]\d{2,})*|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w])"
        ),
        "[PHONE]",
    ),
}


def clean(
    examples: Iterable[Example], rules: CleaningSettings, seen: SeenTexts, drops: DropCounts
) -> list[Example]:
    """Return the examples that pass every rule. Of several duplicates the first is kept.

    Args:
        examples: The examples of one source.
        rules: Rules that apply, with their limits.
        seen: Texts of earlier sources. The texts of `examples` are added.
        drops: Counter of the dropped examples.
    """
    kept = []
    for example in examples:
        reason = _defect(example, rules)
        if reason is None and rules.deduplicate != "none":
            reason = seen.kind(example.text)
            # Dropped duplicates are added as well: a third text may be close to this one only.
            seen.add(example.text)
        if reason is None:
            kept.append(example)
        else:
            drops.drop(STAGE, reason, example.row.where)
    return kept


def redact(examples: Sequence[Example], kinds: Sequence[str]) -> list[Example]:
    """Return the examples with e-mail addresses and phone numbers replaced by [EMAIL] and [PHONE].

    Args:
        examples: Examples of any split.
        kinds: Keys of REDACTIONS.
    """
    if not kinds:
        return list(examples)
    return [
        replace(
            example,
            messages=tuple(
                replace(
                    turn,
                    content=_redacted(turn.content, kinds),
                    input=_redacted(turn.input, kinds),
                    extra=_redacted_value(turn.extra, kinds),
                )
                for turn in example.messages
            ),
        )
        for example in examples
    ]


def _redacted(text: str, kinds: Sequence[str]) -> str:
    for kind in kinds:
        pattern, replacement = REDACTIONS[kind]
        text = pattern.sub(replacement, text)
    return text


def _redacted_value(value: Any, kinds: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _redacted(value, kinds)
    if isinstance(value, Mapping):
        return {key: _redacted_value(item, kinds) for key, item in value.items()}
    return [_redacted_value(item, kinds) for item in value] if isinstance(value, list) else value


def _defect(example: Example, rules: CleaningSettings) -> str | None:
    """Return the first rule that an example breaks regardless of other examples, or None."""
    answer = example.completion.strip()
    # The cheap rules come first. The order also decides which reason is counted.
    if len(answer) < rules.min_completion_chars:
        return f"answer shorter than {rules.min_completion_chars} characters"
    if rules.max_chars is not None and len(example.text) > rules.max_chars:
        return f"longer than {rules.max_chars} characters"
    if rules.completion_pattern is not None and not re.search(rules.completion_pattern, answer):
        return "answer does not match completion_pattern"
    if rules.completion_json and not _is_json(answer):
        return "answer is not JSON"
    return _low_quality(example, answer) if rules.low_quality else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # deeply nested JSON exceeds Python's recursion limit
        return False
    return True


def _low_quality(example: Example, answer: str) -> str | None:
    compared = normalised(answer)
    if compared.rstrip(".") in PLACEHOLDERS or compared in PLACEHOLDERS:
        return "placeholder answer"
    prompts = [
        text for turn in example.messages[:-1] for text in (turn.content, turn.input) if text
    ]
    if any(compared == normalised(text) for text in prompts):
        return "answer repeats the prompt"
    if _repeats_lines(answer):
        return "mostly repeated lines"
    characters = "".join(answer.split())
    if len(characters) < JUDGED_CHARS:
        return None
    if Counter(characters).most_common(1)[0][1] > MAX_SHARE_OF_ONE_CHARACTER * len(characters):
        return "mostly one character"
    return None if _is_text(characters) else "mostly no text"


def _repeats_lines(answer: str) -> bool:
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    distinct = len(set(lines))
    return len(lines) >= JUDGED_LINES and distinct < MIN_SHARE_OF_DISTINCT_LINES * len(lines)


def _is_text(characters: str) -> bool:
    """Return True if letters, digits and combining marks are a large enough share of the text."""
    required = MIN_SHARE_OF_TEXT * len(characters)
    if sum(map(str.isalnum, characters)) >= required:
        return True
    # Many scripts write vowels as combining marks (category M), which isalnum does not count.
    return sum(unicodedata.category(character)[0] in "LNM" for character in characters) >= required
