"""Measure the driver's waits for jobs that report nothing, and decide when a wait is not worth it.

A probe, a check and a judgement report nothing until they are answered. After ten seconds the driver
says what it waits for, and then what the worker says about its work. Trials of plain output have such
a line every half minute. After the end of the study's time it still waits for an answer that may come,
but no longer for a job that hangs. Knows neither workers nor the kinds of jobs.
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
"""Seconds of a wait after which a line says what is waited for. A judgement: a person waits so long
without a doubt whether the program hangs."""
TRIAL_SECONDS = 30.0
"""Seconds between two lines about a trial."""
REPEAT_SECONDS = 60.0
"""Seconds until words are said again that have not changed."""
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
    """The wait for one answer, or for the end of a trial."""

    seconds: float = 0.0
    words: str = ""
    """The newest words of the worker about its work."""
    said: str | None = None
    """The words at the time of the last line, or None before the first line."""
    said_at_s: float = 0.0

    def is_due(self, every_s: float) -> bool:
        """Return True if it is time for a line. Words that have not changed wait longer."""
        news = self.said is None or self.said != self.words
        return self.seconds - self.said_at_s >= (every_s if news else REPEAT_SECONDS)


class JobWaits:
    """Measures the waits of one dispatcher."""

    def __init__(
        self,
        announce: Callable[[str], None],
        workers: WorkerSettings | None = None,
        seconds_over: Callable[[], float] = lambda: -math.inf,
        clock: Callable[[], float] = time.monotonic,
        announce_trial: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            announce: takes a sentence for the person who follows the run.
            workers: the limits to name, None for a pool without any.
            seconds_over: returns the seconds since the end of the study's time, negative before.
            clock: a steady clock in seconds.
            announce_trial: takes a line about a running trial. None: a table shows the trials.
        """
        self._announce = announce
        self._workers = workers
        self._seconds_over = seconds_over
        self._clock = clock
        self._announce_trial = announce_trial
        self._turned = clock()
        self._waits: dict[tuple[str, int, JobPhase], SilentWait] = {}
        self._trials: dict[tuple[str, int, JobPhase], SilentWait] = {}
        self._start = SilentWait()
        self._longest_s = 0.0

    @property
    def time_is_over(self) -> bool:
        """True after the end of the study's time."""
        return self._seconds_over() >= 0

    def turn(self, busy: Sequence[Job], starting: bool) -> None:
        """Add the time since the last turn to each wait, and announce those that are due.

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
        self._turn_trials([job for job in busy if not is_silent(job)], passed_s)
        if starting:
            self._add(self._start, passed_s, self._start_words)
        else:
            self._note(self._start)
            self._start = SilentWait()

    def heard(self, job: Job, words: str) -> None:
        """Take the words of a worker about its work on a job."""
        waits = self._waits if is_silent(job) else self._trials
        waits.setdefault(_key(job), SilentWait()).words = words

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
        # silence before the end of the study's time does not count, because it was allowed
        return min(self._waits[key].seconds, self._seconds_over()) >= self.patience_s

    def _turn_trials(self, trials: Sequence[Job], seconds: float) -> None:
        self._trials = {_key(job): self._trials.get(_key(job), SilentWait()) for job in trials}
        if self._announce_trial is None:
            return
        for job in trials:
            wait = self._trials[_key(job)]
            wait.seconds += seconds
            if wait.is_due(TRIAL_SECONDS):
                wait.said, wait.said_at_s = wait.words, wait.seconds
                self._announce_trial(f"{job.key}: {wait.words or job.activity}")

    def _add(self, wait: SilentWait, seconds: float, words: Callable[[SilentWait], str]) -> None:
        wait.seconds += seconds
        if wait.is_due(SAY_AFTER_SECONDS):
            line = words(wait)
            wait.said, wait.said_at_s = wait.words, wait.seconds
            self._announce(line)

    def _words(self, job: Job, wait: SilentWait) -> str:
        if wait.said not in (None, wait.words):
            return f"{job.key}: {wait.words}"
        checking = job.phase is JobPhase.CHECKING
        activity = "checking whether the trial is possible" if checking else job.activity
        # without the count, as in "judging the untuned base: 3,200 of 17,436 rows"
        activity = wait.words.partition(":")[0] or activity
        limit_s = None if self._workers is None else self._workers.probe_timeout_s
        limit = "no limit" if limit_s is None else f"limit {_duration(limit_s)}"
        seconds = f"{wait.seconds:.0f} s"
        return f"{job.key}: {activity} for {seconds} ({limit}, workers.probe_timeout_s)"

    def _start_words(self, wait: SilentWait) -> str:
        limit_s = None if self._workers is None else start_limit_s(self._workers)
        limit = "" if limit_s is None else f" (limit {_duration(limit_s)})"
        return f"waiting for a worker to start for {wait.seconds:.0f} s{limit}"


def _key(job: Job) -> tuple[str, int, JobPhase]:
    return job.key, job.attempt, job.phase


def _duration(seconds: float) -> str:
    for unit_s, unit in ((3600, "h"), (60, "min")):
        if seconds > unit_s and seconds % unit_s == 0:
            return f"{seconds / unit_s:g} {unit}"
    return f"{seconds:g} s"
