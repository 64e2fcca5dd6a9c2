"""Docstring rows of pinned packages: which functions are public, which rows stay, the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sweeper.core.errors import DataError
from sweeper.data.examples import DropCounts, RawRow
from tests.tools.fake_wheels import SENTENCE, write_wheel
from tools.docstring_data import (
    ROWS_PER_PACKAGE,
    build_data,
    clean_rows,
    pinned_wheels,
    public_functions,
)
from tools.pinned_wheel import PinnedWheel

ROOT = Path(__file__).resolve().parents[2]
KEPT_WHEELS = ROOT / "real_model" / "wheels"
DIGESTS = {
    "general.txt": "1b4c41420b126defd11db22e22eac1a2ebf30221b11b52ae0d47ecd581da793a",
    "gate.jsonl": "c9c185db0be08e178b4029b7bec128b21adcc6db884edaef2aab4714a7c8c0e3",
    "test.jsonl": "9bfaaab767879d74b4ecf596c2fd3f8995cd47005f26afaa5f9e2f5904effdd0",
    "train.jsonl": "e78311410dc840cd2dfbc19b41df2a8d5deea226a8f998351aff75ece116f8e1",
    "validation.jsonl": "a1d1a9075a5f76566478ce0d83edbdc5e43d484f3613977414971989361b9b3e",
}
"""Digests of the rows as docs/real_model.md gives them, made by CPython 3.11."""

SOURCE = b'''
def plain(a, *, b=1) -> int:
    """Return the sum of both numbers.

    More about it.
    """
    def inner():
        """Return what nobody can call."""

async def later():
    """Wait for the other
    task. Then end."""

def _private():
    """Return what users shall not see."""

def bare(): ...

class Shape:
    def area(self):
        """Return the area in square metres."""

    def __init__(self):
        """Make a shape of nothing."""

class _Hidden:
    def seen(self):
        """Return what is hidden."""

if True:
    def guarded():
        """Return a value under a condition."""
'''


def rows(package: str, *pairs: tuple[str, str]) -> list[RawRow]:
    """Return chat rows of signatures and answers."""
    return [
        RawRow(
            {
                "messages": [
                    {"role": "user", "content": signature},
                    {"role": "assistant", "content": answer},
                ],
                "package": package,
            },
            package,
        )
        for signature, answer in pairs
    ]


def functions(subject: str, count: int) -> bytes:
    """Return a module of documented functions that resemble no function of another subject."""
    lines = [
        f'def {subject}_{number}({subject[::-1]}_{number}):\n    """Return {subject} {number} times '
        f'{subject.upper()} and {number**5} {subject}s of kind {number**7}."""\n'
        for number in range(2, count + 2)
    ]
    return "\n".join(lines).encode()


def fake_packages(folder: Path) -> dict[str, list[PinnedWheel]]:
    """Write one small wheel for each split, with modules that are not public as well."""
    subjects = {"test": "apple", "gate": "quartz", "validation": "window", "train": "bridge"}
    hidden = b'def hidden():\n    """Return what is not for users of the package."""\n'
    return {
        split: [
            write_wheel(
                folder,
                subject,
                {
                    f"{subject}/__init__.py": functions(subject, 3),
                    f"{subject}/_private.py": hidden,
                    f"{subject}/tests/test_it.py": hidden,
                    f"{subject}/template.py": b"def {{ name }}():\n",
                },
            )
        ]
        for split, subject in subjects.items()
    }


def test_public_functions_are_what_a_user_can_call() -> None:
    """Methods have their class, conditions are looked into, private and inner functions are not."""
    found = dict(public_functions(SOURCE))
    assert list(found) == [
        "def plain(a, *, b=1) -> int",
        "async def later()",
        "class Shape:\n    def area(self)",
        "def guarded()",
    ]
    assert found["async def later()"].startswith("Wait for the other")


def test_build_writes_chat_rows_by_split(tmp_path: Path) -> None:
    """Each split has the public functions of its own package only, and what is left out is counted."""
    report = build_data(tmp_path / "rows", tmp_path, fake_packages(tmp_path))
    assert report.rows == {
        "test": {"apple": 3},
        "gate": {"quartz": 3},
        "validation": {"window": 3},
        "train": {"bridge": 3},
    }
    lines = (tmp_path / "rows" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    question, answer = first["messages"]
    assert (question["role"], answer["role"], first["package"]) == ("user", "assistant", "bridge")
    assert question["content"].startswith("Write a one-line docstring.\n\ndef bridge_")
    assert answer["content"].startswith("Return bridge ")
    assert report.dropped["not parsed by this Python"] == 4
    card = (tmp_path / "rows" / "README.md").read_text(encoding="utf-8")
    assert "| train | bridge==1.0 | MIT | 3 |" in card


def test_build_gives_the_same_bytes_again(tmp_path: Path) -> None:
    """Two builds of the same packages, also in another order of their files, have equal digests."""
    packages = fake_packages(tmp_path)
    first = build_data(tmp_path / "first", tmp_path, packages)
    again = build_data(tmp_path / "again", tmp_path, packages)
    assert first.sha256 == again.sha256
    assert list(first.sha256) == [
        *("gate.jsonl", "general.txt", "test.jsonl", "train.jsonl", "validation.jsonl")
    ]


def test_general_text_is_prose(tmp_path: Path) -> None:
    """Whole paragraphs of the descriptions stay, once; headings, links and commands do not."""
    build_data(tmp_path / "rows", tmp_path, fake_packages(tmp_path))
    assert (tmp_path / "rows" / "general.txt").read_text(encoding="utf-8") == f"{SENTENCE}\n"


def test_train_loses_the_rows_that_a_judged_split_has() -> None:
    """Equal and nearly equal rows of two splits stay in the judged one alone."""
    shared = ("def total(numbers)", "Return the sum of all the numbers in a list of numbers.")
    near = ("def total(numbers)", "Return the sum of all the numbers in the list of numbers.")
    own = ("def split(text, at)", "Divide a text at each place where the other text occurs.")
    drops = DropCounts()
    kept = clean_rows(
        {"test": {"a": rows("a", shared)}, "train": {"b": rows("b", near, own)}}, drops
    )
    assert [row["package"] for row in kept["test"]] == ["a"]
    assert [row["messages"][1]["content"] for row in kept["train"]] == [own[1]]
    assert drops.total == {"near duplicate": 1}


def test_no_package_fills_a_split() -> None:
    """A package gives no more rows than its split takes of each, and the others are counted."""
    words = [f"def f{number}(x{number * 7919})" for number in range(ROWS_PER_PACKAGE["test"] + 5)]
    pairs = [(word, f"Return {hash_words(word)}.") for word in words]
    drops = DropCounts()
    kept = clean_rows({"test": {"a": rows("a", *pairs)}}, drops)
    assert len(kept["test"]) == ROWS_PER_PACKAGE["test"]
    assert drops.total == {"more than a package may give": 5}


def hash_words(text: str) -> str:
    """Return words that no other text has."""
    from hashlib import sha256

    digest = sha256(text.encode()).hexdigest()
    return " ".join(digest[start : start + 8] for start in range(0, 64, 8))


def test_a_split_without_rows_is_refused_with_the_reasons() -> None:
    """An empty split names its packages and what became of their rows."""
    with pytest.raises(DataError, match=r"of a, b gives a row for test\. Left out: 1 answer does"):
        clean_rows(
            {"test": {"a": rows("a", ("def f()", "no sentence at all")), "b": []}}, DropCounts()
        )


def test_the_table_pins_each_package_once() -> None:
    """No package is in two splits, and each pin has a wheel's name, a digest and a licence."""
    wheels = [wheel for found in pinned_wheels().values() for wheel in found]
    assert set(Counter(wheel.package for wheel in wheels).values()) == {1}
    assert len(wheels) == 23
    for wheel in wheels:
        assert wheel.filename.endswith("-py3-none-any.whl")
        assert len(wheel.sha256) == 64
        assert wheel.licence


@pytest.mark.slow
def test_the_pinned_packages_give_the_documented_rows(tmp_path: Path) -> None:
    """The real packages give the sizes and digests of docs/real_model.md, to the byte."""
    names = [wheel.filename for found in pinned_wheels().values() for wheel in found]
    if missing := [name for name in names if not (KEPT_WHEELS / name).exists()]:
        pytest.skip(f"make real-model has not fetched {missing[0]}")
    report = build_data(tmp_path / "rows", KEPT_WHEELS)
    sizes = {split: sum(found.values()) for split, found in report.rows.items()}
    assert sizes == {"test": 400, "gate": 200, "validation": 200, "train": 2082}
    assert report.sha256 == DIGESTS
