"""Signals as a request that is looked at where it is safe to stop.

An exception raised anywhere could fall between a result's arrival and its being told, or tear a message
in two. The second signal does raise at once, and ends the process soon after, whatever is still to be
closed: somebody is in a hurry.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
"""What a batch system sends before it takes the machine away (Slurm: --signal=B:USR1@120)."""
TEMPORARY_FAILURE = 75
"""EX_TEMPFAIL of sysexits.h: run the same command again."""
HURRY_SECONDS = 1.5


class StopRequested(KeyboardInterrupt):
    """Somebody asked this process to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = TEMPORARY_FAILURE if number in NOTICES else 128 + number


@dataclass
class StopSignal:
    """Whether the user, or the batch system, asked to stop."""

    number: signal.Signals | None = None

    def request(self) -> None:
        """Ask for a stop as Ctrl-C does."""
        self.number = self.number or signal.SIGINT

    def check(self) -> None:
        """Called where stopping is safe.

        Raises:
            Stopped: a stop was asked for.
        """
        if self.number is not None:
            raise StopRequested(self.number)


@contextmanager
def deferred_interrupt() -> Iterator[StopSignal]:
    """Turn stop signals and notices into a request; main thread only.

    A signal that the process was started to ignore (SIGHUP under nohup) stays ignored.
    """
    interrupt = StopSignal()

    def request(number: int, _: object) -> None:
        if interrupt.number is not None:
            _leave_soon(StopRequested(interrupt.number).exit_code)
            raise StopRequested(interrupt.number)
        interrupt.number = signal.Signals(number)

    heard = [number for number in (*STOPS, *NOTICES) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, request) for number in heard}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_soon(exit_code: int) -> None:
    """Closing may wait for a server or a worker; workers end by themselves when the driver is gone."""

    def leave() -> None:
        sys.stdout.flush()
        os._exit(exit_code)

    timer = threading.Timer(HURRY_SECONDS, leave)
    timer.daemon = True
    timer.start()
