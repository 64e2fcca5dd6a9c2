"""The embedded data set: what its rows are, and what they are not."""

import hashlib
import json
import os
import subprocess
import sys
import time
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from sweeper.builtin import docstring_pairs as module
from sweeper.builtin import stdlib_text
from sweeper.builtin.docstring_pairs import (
    DROP_REASONS,
    INSTRUCTION,
    NEAR_DUPLICATE_JACCARD,
    SPLITS,
    DocstringPairs,
    Row,
    clean,
    docstring_pairs,
    first_sentence,
    jaccard,
    make_pairs,
    row_text,
    shingles,
)

BOUNDS = {"train": (1300, 2300), "validation": (230, 450), "test": (220, 450)}
LEAST_ROWS = sum(low for low, _ in BOUNDS.values())


@cache
def pairs() -> DocstringPairs:
    return make_pairs()


def all_rows() -> list[Row]:
    return [row for split in SPLITS for row in pairs().rows[split]]


def row(signature: str, summary: str) -> Row:
    return {"instruction": INSTRUCTION, "input": signature, "output": summary}


def test_splits_are_disjoint_by_module() -> None:
    """No module gives rows to two splits, and the held-out modules give none."""
    groups = [*(stdlib_text.TASK_MODULES[split] for split in SPLITS), stdlib_text.HELD_OUT_MODULES]
    assert all(groups)
    assert not any(left & right for left, right in combinations(groups, 2))


def test_partition_covers_the_library() -> None:
    """Every task and held-out module exists here, and pre-training text has the rest."""
    library = set(stdlib_text.library_modules())
    task = frozenset().union(*stdlib_text.TASK_MODULES.values())
    assert (task | stdlib_text.HELD_OUT_MODULES) - library <= {"tomllib"}  # new in Python 3.11
    assert set(stdlib_text.pretraining_modules()) == library - task


def test_library_modules_leave_out_tests_and_site_packages() -> None:
    """Python's own tests and what a user installed are not the standard library."""
    assert not {"test", "tests", "site-packages", "torch"} & set(stdlib_text.library_modules())


def test_splits_are_disjoint_by_text() -> None:
    """No normalised row occurs twice, in one split or in two."""
    texts = [row_text(each) for each in all_rows()]
    assert len(texts) == len(set(texts)) >= LEAST_ROWS


def test_no_row_is_nearly_another() -> None:
    """Compared each with each, no two rows are alike: the index behind cleaning misses none."""
    sets = sorted((shingles(row_text(each)) for each in all_rows()), key=len)
    assert len(sets) >= LEAST_ROWS
    for number, small in enumerate(sets):
        for large in sets[number + 1 :]:
            if NEAR_DUPLICATE_JACCARD * len(large) > len(small):
                break  # larger sets cannot reach the bound
            assert jaccard(small, large) < NEAR_DUPLICATE_JACCARD


@pytest.mark.parametrize("split", SPLITS)
def test_row_counts_are_as_documented(split: str) -> None:
    """Each split has about the documented size, with room for other Python builds."""
    low, high = BOUNDS[split]
    assert low <= len(pairs().rows[split]) <= high


def test_rows_are_clean() -> None:
    """Every row is one line of 10 to 300 characters with a signature and no doctest."""
    rows = all_rows()
    assert len(rows) >= LEAST_ROWS
    for each in rows:
        assert each.keys() == {"instruction", "input", "output"}
        assert each["instruction"] == INSTRUCTION
        assert 10 <= len(each["output"]) <= 300
        assert each["output"] == " ".join(each["output"].split())
        assert ">>>" not in each["output"]
        assert each["input"].startswith(("def ", "async def ", "class "))
        assert len(each["input"]) <= 300


def test_dropped_counts_every_reason() -> None:
    """The report names all reasons, also those that dropped nothing."""
    assert tuple(pairs().dropped) == DROP_REASONS
    assert pairs().dropped["near_duplicate"] > 0


@pytest.mark.parametrize(
    ("signature", "summary", "reason"),
    [
        ("def f(x)", ">>> f(1) gives one", "doctest"),
        ("def f(x)", "f(x) -> integer", "echo"),
        ("def f(x)", "The following rules hold:", "fragment"),
        ("def f(x)", "Go now.", "too_short"),
        ("def f(x)", "**DEPRECATED**", "too_short"),
        ("def f(x)", "Long " * 61, "too_long"),
        (f"def f({'x' * 300})", "Return something good.", "too_long"),
    ],
)
def test_clean_drops_a_defective_row(signature: str, summary: str, reason: str) -> None:
    """A row that is no good by itself is dropped under its own reason."""
    cleaned = clean({"train": [row(signature, summary)], "validation": [], "test": []})
    assert cleaned.rows["train"] == []
    assert cleaned.dropped == dict.fromkeys(DROP_REASONS, 0) | {reason: 1}


def test_clean_tells_duplicates_from_near_ones() -> None:
    """Case and punctuation make an exact duplicate, a changed word a near one."""
    rows = [
        row("def parse(text)", "Parse the text into a tree of nodes and return its root."),
        row("def parse(text)", "Parse the text into a tree of nodes, and return its ROOT"),
        row("def parse(text)", "Parse the text into a tree of nodes and return the root."),
    ]
    cleaned = clean({"train": rows, "validation": [], "test": []})
    assert cleaned.rows["train"] == rows[:1]
    assert cleaned.dropped["duplicate"] == 1
    assert cleaned.dropped["near_duplicate"] == 1


def test_clean_removes_leaks_from_train() -> None:
    """Of a row in several splits test keeps its copy, then validation; train loses its own."""
    shared = row("def parse(text)", "Parse the text into a tree of nodes and return its root.")
    cleaned = clean({split: [shared] for split in SPLITS})
    assert cleaned.rows == {"train": [], "validation": [], "test": [shared]}
    assert cleaned.dropped["leak"] == 2


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return it. Or not.", "Return it."),
        ("Wrapped over\n    two lines\n\nDetails.", "Wrapped over two lines"),
        ("Accept names, e.g. Foo, as well. More.", "Accept names, e.g. Foo, as well."),
        ("Read version 1.2 files", "Read version 1.2 files"),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    """The first sentence ends at a full stop before a capital, or with the paragraph."""
    assert first_sentence(docstring) == sentence


def test_signatures_read_like_source() -> None:
    """Functions keep defaults and annotations, classes their bases, methods their class."""
    signatures = {each.signature for each in stdlib_text.documented(["shlex", "argparse", "heapq"])}
    assert "def split(s, comments=False, posix=True)" in signatures
    assert "class ArgumentParser(_AttributeHolder, _ActionsContainer)" in signatures
    assert "class ArgumentParser:\n    def error(self, message)" in signatures


def test_documented_reads_a_library_in_order(tmp_path: Path) -> None:
    """Modules and files go by name, definitions by line; tests and absent modules are skipped."""
    (tmp_path / "ast.py").touch()
    (tmp_path / "box" / "tests").mkdir(parents=True)
    (tmp_path / "box" / "tests" / "case.py").write_text('"""A test."""')
    (tmp_path / "box" / "__init__.py").write_text('"""The box."""')
    (tmp_path / "box" / "lid.py").write_text(
        "class Lid(Top, metaclass=Meta):\n"
        "    if True:\n"
        "        async def lift(self, *, by: int = 1) -> None:\n"
        '            """Lift it."""\n'
        "            def inner():\n"
        '                """Within."""\n'
    )
    (tmp_path / "axe.py").write_text('class Axe(Tool, metaclass=Meta):\n    """Cuts."""\n')
    found = stdlib_text.documented(["box", "axe", "absent"], root=tmp_path)
    assert [(each.module, each.signature, each.docstring) for each in found] == [
        ("axe", "class Axe(Tool, metaclass=Meta)", "Cuts."),
        ("box", "", "The box."),
        ("box", "class Lid:\n    async def lift(self, *, by: int=1) -> None", "Lift it."),
        ("box", "def inner()", "Within."),
    ]
    assert stdlib_text.library_modules(tmp_path) == ["ast", "axe", "box"]


def test_library_without_source_is_refused(tmp_path: Path) -> None:
    """A Python without .py files gets a message, not an empty data set."""
    with pytest.raises(FileNotFoundError, match="has no source files"):
        stdlib_text.library_modules(tmp_path)


def _run(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.mark.slow
def test_rows_do_not_depend_on_the_hash_seed() -> None:
    """Two processes with different hash seeds make the same rows in the same order."""
    code = (
        "import hashlib, json, sweeper.builtin.docstring_pairs as m; p = m.make_pairs();"
        "print(hashlib.sha256(json.dumps([p.rows, p.dropped]).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps([pairs().rows, pairs().dropped]).encode()).hexdigest()
    assert [_run(code, PYTHONHASHSEED=seed) for seed in ("1", "2")] == [here, here]


def test_pairs_import_no_torch() -> None:
    """The data set is made without torch or transformers."""
    code = (
        "import sys, sweeper.builtin.docstring_pairs as p; p.docstring_pairs();"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert _run(code) == "set()"


def test_pairs_are_made_in_seconds() -> None:
    """Extraction and cleaning cost about 2 CPU-seconds."""
    started = time.process_time()
    make_pairs()
    assert time.process_time() - started < 8


def test_kept_pairs_are_those_that_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files make the rows once. A damaged file or changed sources make them again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []
    monkeypatch.setattr(module, "make_pairs", lambda: made.append(1) or pairs())
    assert docstring_pairs() == docstring_pairs() == pairs()
    assert len(made) == 1
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text(kept.read_text().replace("Return", "return", 1))
    assert docstring_pairs() == docstring_pairs() == pairs()
    assert len(made) == 2
    monkeypatch.setattr(module, "source_digest", lambda *_, **__: "of other files")
    docstring_pairs()
    assert len(made) == 3


def test_a_changed_library_has_another_digest(tmp_path: Path) -> None:
    """A file's content, its name and further code decide."""
    for name in ("ast.py", "csv.py"):
        (tmp_path / name).write_text("def f(): 'Do it.'")
    code = tmp_path / "code.py"
    code.write_text("pass")
    before = stdlib_text.source_digest({"ast", "csv"}, (code,), tmp_path)
    assert stdlib_text.source_digest({"csv", "ast"}, (code,), tmp_path) == before
    assert stdlib_text.source_digest({"ast"}, (code,), tmp_path) != before
    for changed in (tmp_path / "csv.py", code):
        changed.write_text("def g(): 'Do it.'")
        now = stdlib_text.source_digest({"ast", "csv"}, (code,), tmp_path)
        assert now != before
        before = now


@pytest.mark.slow
def test_kept_pairs_cost_no_making() -> None:
    """A worker that starts later reads the rows in a fifth of the time."""
    docstring_pairs()
    began = time.process_time()
    docstring_pairs()
    read_s, began = time.process_time() - began, time.process_time()
    make_pairs()
    assert read_s < (time.process_time() - began) / 5
