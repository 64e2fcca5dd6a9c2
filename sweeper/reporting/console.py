"""The console that every command prints to. No text is markup, and none steers a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sweeper.core.plain_text import visible
from sweeper.core.redaction import redact
from sweeper.core.steady_output import SteadyStream

PLAIN_COLUMNS = 160
"""Width in characters for pipes and log files, where rich would assume 80."""


class PlainConsole(Console):
    """A console that shows every text as it is, with its control characters made visible."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream, whose writes never fail."""
        found = Console.file.fget(self)  # type: ignore[attr-defined]
        return found if isinstance(found, SteadyStream) else SteadyStream(found)  # type: ignore

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        Console.file.fset(self, new_file)  # type: ignore[attr-defined]

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text for printing. Cells and titles of tables come through here as well."""
        return super().render_str(redact(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Return anything as segments."""
        for segment in super().render(renderable, options):
            # rich's own movements of the cursor are marked as such
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def make_console(stderr: bool = False) -> PlainConsole:
    """Return a console for stdout or stderr, wide enough for tables if the stream is no terminal."""
    file = sys.stderr if stderr else sys.stdout
    return PlainConsole(width=None if _is_terminal(file) else PLAIN_COLUMNS, stderr=stderr)


def _is_terminal(file: TextIO | None) -> bool:
    try:
        return file is not None and file.isatty()
    except ValueError:  # closed
        return False


def say(console: Console, text: str) -> None:
    """Print text as it is: nothing in it is markup, and long lines are left to the terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
