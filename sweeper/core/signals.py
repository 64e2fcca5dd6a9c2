"""Turn stop signals into a request that the program checks where stopping is safe.

An exception raised at an arbitrary line could lose a result between its arrival and its recording, or
cut a message in two. A second signal does raise at once and ends the process shortly after, even if
something is still closing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a batch system sends before it takes the machine away (Slurm: --signal=B:USR1@120)."""
TEMPORARY_FAILURE = 75
"""Exit code that asks the batch system to run the same command again (EX_TEMPFAIL of sysexits.h)."""
PR_SET_PDEATHSIG = 1
"""The request of prctl(2)."""
HURRY_SECONDS = 1.5
"""Seconds between a second signal and the end of the process. A judgement: a person has asked twice."""


class StopRequested(KeyboardInterrupt):
    """A user or a batch system asked this process to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        # 128 + number is the shell's exit code of a process that a signal ended (130 for Ctrl-C).
        self.exit_code = TEMPORARY_FAILURE if number in NOTICES else 128 + number


@dataclass
class StopSignal:
    """The stop signal that this process has received, if any."""

    number: signal.Signals | None = None

    def request(self) -> None:
        """Request a stop as Ctrl-C does."""
        # a signal that came before keeps its exit code
        self.number = self.number or signal.SIGINT

    def check(self) -> None:
        """Raise if a stop was requested. Call this where stopping is safe.

        Raises:
            StopRequested: A stop was requested.
        """
        if self.number is not None:
            raise StopRequested(self.number)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends. Elsewhere the process must notice it."""
    # A process that is stopped (SIGSTOP) cannot notice anything, and would hold its device for ever
    _at_parents_end(signal.SIGKILL)


def exit_with_parent() -> None:
    """Let this process remove its temporary files and exit on SIGTERM, which Linux sends when its
    parent ends.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    _at_parents_end(signal.SIGTERM)


def _at_parents_end(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def deferred_interrupt() -> Iterator[StopSignal]:
    """Turn stop signals and notices into a request while the context is open (main thread only).

    A signal that the process ignored from its start (SIGHUP under nohup) stays ignored.
    """
    interrupt = StopSignal()

    def request(number: int, _: object) -> None:
        if interrupt.number is not None:  # the second signal: the user does not want to wait
            _exit_soon(StopRequested(interrupt.number).exit_code)
            raise StopRequested(interrupt.number)
        interrupt.number = signal.Signals(number)

    # what the parent ignores stays ignored, as SIGHUP under nohup
    handled = [each for each in (*STOPS, *NOTICES) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, request) for number in handled}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_soon(exit_code: int) -> None:
    """Exit the process after HURRY_SECONDS, even if closing waits for a server or a worker."""

    # os._exit is safe here: workers end on their own when the driver's process is gone.
    def leave() -> None:
        sys.stdout.flush()
        os._exit(exit_code)

    timer = threading.Timer(HURRY_SECONDS, leave)
    timer.daemon = True  # a clean exit before the time is up must not wait for the timer
    timer.start()
