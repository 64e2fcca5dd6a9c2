"""Cleaning: what is left out, for which reason, and what must stay."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from sweeper.builtin.docstring_pairs import jaccard, shingles
from sweeper.data.cleaning import clean, redact
from sweeper.data.duplicates import SeenTexts, normalised
from sweeper.data.examples import DropCounts, Example
from tests.data.samples import example, make_data


def cleaned(*examples: Example, **rules: object) -> tuple[list[str], dict[str, int]]:
    """The answers that stay, and the reasons of the others."""
    settings = make_data(cleaning=rules).cleaning
    drops = DropCounts()
    near = settings.near_threshold if settings.deduplicate == "near" else None
    kept = clean(examples, settings, SeenTexts(near), drops)
    return [item.completion for item in kept], drops.total


def test_exact_duplicates_differ_in_case_and_white_space_only() -> None:
    """The first of equal rows stays; an operator or a digit makes another row."""
    rows = [example("Add  1", "1 + 1"), example("add\n1", "1 + 1"), example("Add 1", "1 - 1")]
    assert cleaned(*rows) == (["1 + 1", "1 - 1"], {"duplicate": 1})
    assert cleaned(*rows, deduplicate="none") == (["1 + 1", "1 + 1", "1 - 1"], {})


def test_unicode_forms_of_one_text_are_equal() -> None:
    """A composed and a decomposed letter are the same letter; other scripts are told apart."""
    assert normalised("e\u0301") == normalised("\u00c9")
    assert cleaned(example("?", "你好"), example("?", "世界"))[1] == {}


SENTENCE = "The quick brown fox jumps over the lazy dog and runs away into the dark green forest"


def test_near_duplicates_are_judged_by_the_threshold() -> None:
    """One changed letter is a near duplicate at 0.8 and none at 0.99; exact mode keeps both."""
    rows = [example("Tell.", SENTENCE), example("Tell.", SENTENCE + "s")]
    assert cleaned(*rows, deduplicate="near")[1] == {"near duplicate": 1}
    assert cleaned(*rows, deduplicate="near", near_threshold=0.99)[1] == {}
    assert cleaned(*rows)[1] == {}


def test_near_duplicates_agree_with_all_pairs_compared() -> None:
    """MinHash finds what comparing every row with every kept one finds, on 300 varied rows."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(40)]
    base = [" ".join(rng.choices(words, k=30)) for _ in range(60)]
    texts = []
    for text in base * 5:
        changed = text.split()
        for _ in range(rng.randrange(8)):
            changed[rng.randrange(30)] = rng.choice(words)
        texts.append(" ".join(changed))
    kept: list[frozenset[str]] = []
    expected = []
    for text in texts:
        own = shingles(normalised(text))
        expected.append(any(jaccard(own, other) >= 0.8 for other in kept))
        if not expected[-1]:
            kept.append(own)
    seen = SeenTexts(0.8)
    found = []
    for text in texts:
        found.append(seen.kind(text) is not None)
        if not found[-1]:
            seen.add(text)
    assert 50 < sum(expected) < 250
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 3


@pytest.mark.slow
def test_near_duplicates_do_not_depend_on_the_hash_seed() -> None:
    """Two interpreters with different hash seeds leave out the same rows."""
    code = (
        "import random; from sweeper.data.duplicates import SeenTexts\n"
        "r = random.Random(0); s = SeenTexts(0.6)\n"
        "for n in range(200):\n"
        "    t = ' '.join(r.choices(['alpha', 'beta', 'gamma', 'delta'], k=9))\n"
        "    print(s.kind(t), end=' '); s.add(t)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "near duplicate" in outputs.pop()


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"min_completion_chars": 5}, "answer shorter than 5 characters"),
        ({"max_chars": 8}, "longer than 8 characters"),
        ({"completion_pattern": r"^\d+$"}, "answer does not match completion_pattern"),
        ({"completion_json": True}, "answer is not JSON"),
    ],
)
def test_length_and_format_filters_count_their_reason(
    rules: dict[str, object], reason: str
) -> None:
    """Each filter leaves the row out that breaks its rule, and lets the other one pass."""
    passes = {"min_completion_chars": "12345", "max_chars": "1234"}.get(next(iter(rules)), "42")
    fails = {"max_chars": "123456"}.get(next(iter(rules)), "no :")
    assert cleaned(example("abc", passes), example("abd", fails), **rules) == (
        [passes],
        {reason: 1},
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("N/A", "placeholder answer"),
        ("n/a.", "placeholder answer"),
        (" TODO ", "placeholder answer"),
        ("...", "placeholder answer"),
        ("<nooutput>", "placeholder answer"),
        ("what is THIS?", "answer repeats the prompt"),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "mostly one character"),
        ("=-=+*&^%$#@!=-=+*&^%$#@!x1", "mostly no text"),
        ("no\n" * 6, "mostly repeated lines"),
        ("no\nyes\n\nno\nno\nno\n", "mostly repeated lines"),
    ],
)
def test_low_quality_answers_are_left_out_by_stated_rules(answer: str, reason: str) -> None:
    """Each rule has its reason; without low_quality nothing of this is judged."""
    row = example("What is this?", answer)
    assert cleaned(row, low_quality=True) == ([], {reason: 1})
    assert cleaned(row)[1] == {}


@pytest.mark.parametrize(
    "answer",
    [
        "42",
        "None",
        "-1",
        "Ja.",
        "नमस्ते, आप कैसे हैं? मैं ठीक हूँ।",
        "def f(x):\n    return x\n\n\ndef g(y):\n    return -y\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
        "1. wash\n2. cut\n3. cook\n4. serve\n5. wash up",
        '{"a": [1, 2, 3], "b": {"c": "d"}}',
    ],
)
def test_sound_answers_pass_the_low_quality_filter(answer: str) -> None:
    """Numbers, short words, other scripts, code, tables, lists and JSON are answers."""
    assert cleaned(example("What is this?", answer), low_quality=True) == ([answer], {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ask jane.doe+x@mail.example.org.", "Ask [EMAIL]."),
        ("Call +49 30 1234567 now", "Call [PHONE] now"),
        ("Call (030) 1234-567 or 555-123-4567.", "Call [PHONE] or [PHONE]."),
        ("In 2024 we sold 1234567 of 3.14159265 for 12,345.67", None),
        ("10 + 20 = 30, 2023-11-05, 192.168.0.1, v1.2.3", None),
    ],
)
def test_redaction_replaces_addresses_and_leaves_numbers(text: str, expected: str | None) -> None:
    """E-mail addresses and telephone numbers go, figures and dates stay; only what is asked for."""
    [row] = redact([example(text, text)], ["email", "phone"])
    assert [turn.content for turn in row.messages] == [expected or text] * 2
    [untouched] = redact([example(text, text)], [])
    assert untouched.completion == text
