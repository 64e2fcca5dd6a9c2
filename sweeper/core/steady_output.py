"""Output that never fails: what cannot be printed is lost, and the work continues.

A closed pipe, a full disk behind a redirection, and a terminal of another encoding say nothing about
the work that a line reports on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from sweeper.core.plain_text import visible
from sweeper.core.redaction import redact


class SteadyStream:
    """A text stream whose writes never raise. Everything else is the wrapped stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if getattr(stream, "errors", None) == "strict":
            with suppress(AttributeError, ValueError, OSError):  # not every stream can be changed
                stream.reconfigure(errors="replace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        try:
            self._stream.write(text)
        except UnicodeError:
            self._write_ascii(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._drop()
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts, or lose them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, or lose what it held."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write_ascii(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text.encode("ascii", "replace").decode("ascii"))

    def _drop(self) -> None:
        """Forget what the stream has buffered, so that no later flush fails, the last one included."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            kept = os.dup(self._stream.fileno())
            try:
                os.dup2(nowhere, self._stream.fileno())
                self._stream.flush()
                os.dup2(kept, self._stream.fileno())
            finally:
                os.close(nowhere)
                os.close(kept)


@contextmanager
def steady_output() -> Iterator[None]:
    """Let nothing that is printed inside fail."""
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout = SteadyStream(sys.stdout or _nowhere())
    sys.stderr = SteadyStream(sys.stderr or _nowhere())
    try:
        yield
    finally:
        with suppress(AttributeError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def echo(text: object, *, stderr: bool = False, end: str = "\n") -> None:
    """Print a text without layout, for people and for programs."""
    print(
        visible(redact(str(text))), file=sys.stderr if stderr else sys.stdout, end=end, flush=True
    )


def _fill_descriptors() -> None:
    """Open what the caller has closed, or the next file that is opened would take its number.

    That file may be a database, and a child's output would be written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - lives as long as the process
