"""Where everything is printed."""

from __future__ import annotations

import sys

from rich.console import Console

PLAIN_COLUMNS = 140


def make_console() -> Console:
    """Wide enough for a table when it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)
