"""The clock of a pause: what it takes out of the budget, and how long it waits for running jobs."""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE_PATIENCE_SECONDS = 20.0
"""Time limit of a paused trial until its checkpoint. After it the worker is killed, and the trial later
continues from the checkpoint before. 10 of the promised 30 s are left for the rest."""


class PauseClock:
    """Measures one pause after the other."""

    def __init__(
        self,
        not_counted: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            not_counted: called with the seconds of a pause that no budget should count.
            clock: a steady clock in seconds.
        """
        self._not_counted = not_counted
        self._clock = clock
        self._began = 0.0
        self._counted_until = 0.0
        self._patient_until = 0.0
        self.workers_ended = False
        """True once the workers were ended, so that their devices are free."""

    def begin(self) -> None:
        """Start to measure a pause."""
        self._began = self._counted_until = self._clock()
        self._patient_until = self._began + PAUSE_PATIENCE_SECONDS
        self.workers_ended = False

    def count(self) -> None:
        """Take the time since the last call out of the budget."""
        now = self._clock()
        self._not_counted(now - self._counted_until)
        self._counted_until = now

    @property
    def seconds(self) -> float:
        """Seconds since the pause began."""
        return self._clock() - self._began

    def patience_is_over(self) -> bool:
        """Return True once each time that running jobs have exceeded the patience."""
        if self._clock() <= self._patient_until:
            return False
        # the losses of the killed workers arrive soon
        self._patient_until += PAUSE_PATIENCE_SECONDS
        return True
