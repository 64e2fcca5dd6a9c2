"""Where everything is printed."""

from __future__ import annotations

import sys

from rich.console import Console

PLAIN_COLUMNS = 160


def make_console(stderr: bool = False) -> Console:
    """Wide enough for a table when it is no terminal."""
    file = sys.stderr if stderr else sys.stdout
    return Console(width=None if file.isatty() else PLAIN_COLUMNS, stderr=stderr)
