"""What cannot be printed is lost, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper.core.plain_text import in_code, in_markdown, visible
from sweeper.core.steady_output import SteadyStream
from sweeper.reporting.console import PlainConsole
from sweeper.reporting.html_page import _render
from sweeper.reporting.text_table import TextTable

HOSTILE = ("[/x]", "[bold]x[/bold]", "a|b", "`x`", "![i](http://h/i.png)", "<img src=x>", ":smile:")
STEERING = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202etxt.exe"


class Failing(io.StringIO):
    """A stream that fails in one way."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "x"), OSError(28, "full"), OSError(5, "io"), ValueError("closed file")],
)
def test_a_stream_that_fails_raises_nothing(error: Exception) -> None:
    """Neither for print nor for the console and its tables."""
    stream = SteadyStream(Failing(error))
    print("x", file=stream, flush=True)
    console = PlainConsole(file=Failing(error))
    console.print("x")
    console.print(TextTable("t", ("a",), (("b",),)).draw())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_takes_every_text(encoding: str) -> None:
    """A letter that the encoding lacks becomes a question mark, and a lone surrogate as well."""
    raw = io.BytesIO()
    stream = SteadyStream(io.TextIOWrapper(raw, encoding=encoding))
    print("– é 語 \udcff end", file=stream, flush=True)
    assert raw.getvalue().endswith(b"end\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_the_console_takes_nothing_for_markup(text: str) -> None:
    """In lines, in cells, in titles and in heads of tables."""
    file = io.StringIO()
    console = PlainConsole(file=file, width=200)
    console.print(text)
    console.print(TextTable(text, (text,), ((text,),), frozenset({text})).draw())
    assert file.getvalue().count(text) == 4


def test_no_text_steers_the_terminal() -> None:
    """Escapes, the bell, C1 and marks that reverse the reading order are shown as marks."""
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=True)
    console.print(STEERING)
    console.print(TextTable(STEERING, ("a",), ((STEERING,),)).draw())
    assert not set("\x07\r\x9b\u202e") & set(file.getvalue())
    assert "\x1b[2J" not in file.getvalue()
    assert "\x1b]0" not in file.getvalue()
    assert visible("a\tb\nc") == "a\tb\nc"


@pytest.mark.parametrize("text", [*HOSTILE, "\\[x](y)", "\\|x", "a\n| b | c |\n", "[x]: http://h"])
def test_markdown_shows_every_text_as_it_is(text: str) -> None:
    """One row stays one row, and a strict reader and one with links and pictures show the text."""
    from markdown_it import MarkdownIt

    table = TextTable("", ("head", "other"), ((text, "next"),)).markdown()
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(table)
    assert page.count("<td") == 2
    for tag in ("<img", "<a ", "<code"):
        assert tag not in page
    assert "<code>" in _render(in_code(text))
    assert "<a " not in MarkdownIt("commonmark").render(f"- x: {in_markdown(text)}")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full 2>&1"])
def test_a_command_ends_as_usual_without_its_output(closed: str, tmp_path: Path) -> None:
    """The exit code is that of the work, and nothing is written into a file that took the number."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m sweeper study list {closed}"],
        cwd=tmp_path,
        env=dict(os.environ),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stdout + done.stderr
