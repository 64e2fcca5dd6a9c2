"""The console that every command prints to."""

from __future__ import annotations

import sys

from rich.console import Console

PLAIN_COLUMNS = 160
"""Width in characters for pipes and log files, where rich would assume 80."""


def make_console(stderr: bool = False) -> Console:
    """Return a console for stdout or stderr, wide enough for tables if the stream is no terminal."""
    file = sys.stderr if stderr else sys.stdout
    return Console(width=None if file.isatty() else PLAIN_COLUMNS, stderr=stderr)


def say(console: Console, text: str) -> None:
    """Print text as it is: nothing in it is markup, and long lines are left to the terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
