"""A process with torch is heard while it works, and its end is never taken for an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.commands.torch_process import ask
from sweeper.core.errors import WorkerError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that a started Python finds, to be filled by the test."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "asked.py"


def test_words_are_passed_on_while_the_process_works(module: Path) -> None:
    """The newest words come at once and again, with the seconds so far, and are no answer."""
    module.write_text(
        'import time\nprint(\'"first"\', flush=True)\ntime.sleep(1)\nprint("a library")\n'
        "print('\"second\"', flush=True)\ntime.sleep(1)\nprint([1])\n"
    )
    told: list[str] = []
    assert ask("asked", [], "works", 60.0, tell=told.append, words_s=0.1) == [1]
    assert told[0].endswith(" s: first")
    assert told[-1].endswith(" s: second")
    assert len(told) > 4


@pytest.mark.parametrize(
    ("code", "limit_s", "reason"),
    [
        ("raise SystemExit('no model')", 60.0, "the process that works died:\nno model"),
        ("print('no list')", 60.0, "the process that works died"),
        ("import time; time.sleep(60)", 0.5, "gave no answer for 0.00833333 min"),
    ],
    ids=["failed", "silent", "endless"],
)
def test_a_process_without_an_answer_is_an_error(
    module: Path, code: str, limit_s: float, reason: str
) -> None:
    """The message says what the process said, or how long it was waited for."""
    module.write_text(code)
    with pytest.raises(WorkerError, match=reason):
        ask("asked", [], "works", limit_s)
