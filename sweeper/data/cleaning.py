"""Clean: leave out examples that teach nothing or repeat others, each with its reason in the ledger.

Every rule is stated here, in numbers; none guesses at meaning. Knows no tokens. Redaction changes text
instead of leaving it out, and is the one step that validation and test files go through as well.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

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
"""Answers that stand for a missing one, as they are after `normalised` and without a last full stop."""

JUDGED_CHARS = 20
"""Shorter answers are not judged by their characters: `42` and `3 + 4` are answers."""
MAX_SHARE_OF_ONE_CHARACTER = 0.5
MIN_SHARE_OF_TEXT = 0.1
"""Letters and digits among the characters; JSON and tables of figures have about a quarter."""
JUDGED_LINES = 5
MIN_SHARE_OF_DISTINCT_LINES = 0.5

REDACTIONS = {
    "email": (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[EMAIL]"),
    # +49 30 1234567, (030) 1234-567, 555-123-4567: groups, so that plain numbers stay
    "phone": (
        re.compile(
            r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(\d+\)[ .-]?)?\d{2,}(?:[ .-]?\d{2,})+"
            r"|\(\d{2,5}\)[ .-]?\d{3,}(?:[ .-]\d{2,})*|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w])"
        ),
        "[PHONE]",
    ),
}


def clean(
    examples: Iterable[Example], rules: CleaningSettings, seen: SeenTexts, ledger: DropCounts
) -> list[Example]:
    """The examples that pass every rule; the first of several duplicates stays.

    Args:
        examples: of one source.
        rules: which rules apply, with their limits.
        seen: what earlier sources held; it remembers these examples too.
        ledger: where the others are counted.
    """
    kept = []
    for example in examples:
        reason = _defect(example, rules)
        if reason is None and rules.deduplicate != "none":
            reason = seen.kind(example.text)
            seen.add(example.text)
        if reason is None:
            kept.append(example)
        else:
            ledger.drop(STAGE, reason, example.row.where)
    return kept


def redact(examples: Sequence[Example], kinds: Sequence[str]) -> list[Example]:
    """The examples with e-mail addresses and telephone numbers replaced by [EMAIL] and [PHONE]."""
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
                )
                for turn in example.messages
            ),
        )
        for example in examples
    ]


def _redacted(text: str, kinds: Sequence[str]) -> str:
    for kind in kinds:
        pattern, word = REDACTIONS[kind]
        text = pattern.sub(word, text)
    return text


def _defect(example: Example, rules: CleaningSettings) -> str | None:
    """Why an example is no good by itself."""
    answer = example.completion.strip()
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
    except (ValueError, RecursionError):
        return False
    return True


def _low_quality(example: Example, answer: str) -> str | None:
    said = normalised(answer)
    if said.rstrip(".") in PLACEHOLDERS or said in PLACEHOLDERS:
        return "placeholder answer"
    asked = [text for turn in example.messages[:-1] for text in (turn.content, turn.input) if text]
    if any(said == normalised(text) for text in asked):
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
    """Whether letters, digits and the marks that many scripts write vowels with are enough of it."""
    wanted = MIN_SHARE_OF_TEXT * len(characters)
    if sum(map(str.isalnum, characters)) >= wanted:
        return True
    return sum(unicodedata.category(character)[0] in "LNM" for character in characters) >= wanted
