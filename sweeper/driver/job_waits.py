"""How long the driver has waited for jobs that report nothing, and when such a wait is not worth it.

A probe, a check and a judgement report nothing until they are answered. After ten seconds the driver
says what it waits for. After the end of the study's time it still waits for an answer that may come, but
no longer for a job that hangs. Knows neither workers nor the kinds of jobs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sweeper.config.settings import WorkerSettings
from sweeper.driver.jobs import Job, JobPhase
from sweeper.workers.time_limits import start_limit_s

SAY_AFTER_SECONDS = 10.0
LAST_SECONDS = 60.0
"""Wait for an answer after the end of the study's time, if no earlier answer took longer."""
LAST_FACTOR = 2.0
"""The same in multiples of the longest answer or start of this run: longer than that is a hang."""
LONGEST_TURN_SECONDS = 2.0
"""A longer turn of the dispatcher means that the driver was suspended or waited for its database."""


def is_silent(job: Job) -> bool:
    """Return True if a job that occupies a worker reports nothing before its answer."""
    return not job.stoppable or job.phase is JobPhase.CHECKING


@dataclass
class SilentWait:
    """The wait for one answer."""

    seconds: float = 0.0
    said: bool = False


class JobWaits:
    """Measures the waits of one dispatcher."""

    def __init__(
        self,
        announce: Callable[[str], None],
        workers: WorkerSettings | None = None,
        seconds_over: Callable[[], float] = lambda: -math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            announce: takes a sentence for the person who follows the run.
            workers: the limits to name, None for a pool without any.
            seconds_over: returns the seconds since the end of the study's time, negative before.
            clock: a steady clock in seconds.
        """
        self._announce = announce
        self._workers = workers
        self._seconds_over = seconds_over
        self._clock = clock
        self._turned = clock()
        self._waits: dict[tuple[str, int, JobPhase], SilentWait] = {}
        self._start = SilentWait()
        self._longest_s = 0.0

    @property
    def time_is_over(self) -> bool:
        """True after the end of the study's time."""
        return self._seconds_over() >= 0

    def turn(self, busy: Sequence[Job], starting: bool) -> None:
        """Add the time since the last turn to each wait, and announce each wait once.

        Args:
            busy: the jobs that occupy a worker.
            starting: True if none does, and no worker is ready for one.
        """
        now = self._clock()
        passed_s, self._turned = min(now - self._turned, LONGEST_TURN_SECONDS), now
        silent = {_key(job): job for job in busy if is_silent(job)}
        self._waits = {key: self._waits.get(key, SilentWait()) for key in silent}
        for key, job in silent.items():
            self._add(self._waits[key], passed_s, partial(self._words, job))
        if starting:
            self._add(self._start, passed_s, self._start_words)
        else:
            self._note(self._start)
            self._start = SilentWait()

    def answered(self, job: Job) -> None:
        """Note that a job was answered, which shows how long an answer may take."""
        self._note(self._waits.get(_key(job), SilentWait()))

    def hanging(self, busy: Sequence[Job]) -> list[Job]:
        """Return the jobs that are not worth waiting for any longer."""
        return [job for job in busy if _key(job) in self._waits and self._hangs(_key(job))]

    @property
    def start_hangs(self) -> bool:
        """True if the start of a worker is not worth waiting for any longer."""
        return min(self._start.seconds, self._seconds_over()) >= self.patience_s

    @property
    def patience_s(self) -> float:
        """Seconds of silence after the end of the study's time that count as a hang."""
        return max(LAST_SECONDS, LAST_FACTOR * self._longest_s)

    def _note(self, ended: SilentWait) -> None:
        self._longest_s = max(self._longest_s, ended.seconds)

    def _hangs(self, key: tuple[str, int, JobPhase]) -> bool:
        return min(self._waits[key].seconds, self._seconds_over()) >= self.patience_s

    def _add(self, wait: SilentWait, seconds: float, words: Callable[[], str]) -> None:
        wait.seconds += seconds
        if wait.seconds >= SAY_AFTER_SECONDS and not wait.said:
            wait.said = True
            self._announce(words())

    def _words(self, job: Job) -> str:
        checking = job.phase is JobPhase.CHECKING
        activity = "checking whether the trial is possible" if checking else job.activity
        limit_s = None if self._workers is None else self._workers.probe_timeout_s
        limit = "no limit" if limit_s is None else f"limit {_duration(limit_s)}"
        return f"{job.key}: {activity} for {SAY_AFTER_SECONDS:.0f} s ({limit}, workers.probe_timeout_s)"

    def _start_words(self) -> str:
        limit_s = None if self._workers is None else start_limit_s(self._workers)
        limit = "" if limit_s is None else f" (limit {_duration(limit_s)})"
        return f"waiting for a worker to start for {SAY_AFTER_SECONDS:.0f} s{limit}"


def _key(job: Job) -> tuple[str, int, JobPhase]:
    return job.key, job.attempt, job.phase


def _duration(seconds: float) -> str:
    for unit_s, unit in ((3600, "h"), (60, "min")):
        if seconds > unit_s and seconds % unit_s == 0:
            return f"{seconds / unit_s:g} {unit}"
    return f"{seconds:g} s"
