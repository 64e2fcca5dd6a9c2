"""Ctrl-C and SIGTERM as a request that is looked at where it is safe to stop.

A KeyboardInterrupt raised anywhere could fall between a result's arrival and its being told, or tear a
message in two. The second signal does raise at once: somebody is in a hurry.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Whether the user asked to stop."""

    requested: bool = False

    def check(self) -> None:
        """Called where stopping is safe.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        if self.requested:
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into a request; main thread only."""
    interrupt = Interrupt()

    def request(*_: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
