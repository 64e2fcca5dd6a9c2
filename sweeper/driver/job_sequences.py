"""Sources of jobs that follow one another, and several such sequences on one pool of workers.

A sequence is written as a generator of sources: the code between two `yield`s runs when all jobs of the
source before have ended. Sequences take free slots in their order, so a later one gets what the earlier
ones leave. Knows neither arms nor budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sweeper.driver.jobs import Job, JobList, JobSource


class JobSequence:
    """Sources that run one after the other."""

    def __init__(self, sources: Iterator[JobSource[Any] | None]) -> None:
        """
        Args:
            sources: gives the next source when all jobs of the one before have ended. None stands for a
                wait for another sequence: it is asked again whenever a slot is free.
        """
        self._sources = sources
        self._source: JobSource[Any] = JobList[Job](())
        self._open = 0
        self.ended = False
        """True once no source is left."""

    @property
    def budget_left(self) -> str:
        """The remaining budget of the present source as text, or "" when it has no limit."""
        return self._source.budget_left

    def next_job(self) -> Job | None:
        """Return the next job to start, or None if there is none at the moment."""
        while not self.ended:
            job: Job | None = self._source.next_job()
            if job is not None:
                self._open += 1
                return job
            if self._open or not self._source.done or not self._advance():
                return None
        return None

    def withdraw(self, key: str) -> Job | None:
        """See JobSource."""
        job: Job | None = self._source.withdraw(key)
        self._open += job is not None
        return job

    def settle(self) -> None:
        """Begin with the next source if all jobs of the present one have ended."""
        while not self.ended and not self._open and self._source.done and self._advance():
            pass

    def finished(self, job: Job) -> None:
        """Take a job that has its result, or that was cancelled and has none."""
        self._open -= 1
        self._source.finished(job)

    def abandon(self) -> None:
        """See JobSource: sources that were not begun leave no trace."""
        self._source.abandon()

    def _advance(self) -> bool:
        """Begin with the next source, and return False if there is none yet or none at all."""
        # one turn at most: `next` with a default would not tell a wait (None) from the end
        for found in self._sources:
            if found is not None:
                self._source = found
            return found is not None
        self.ended = True
        return False


class JobSequences:
    """Several sequences as one source. The first one that has a job gets the free slot."""

    def __init__(self, sequences: Sequence[JobSequence]) -> None:
        self._sequences = sequences
        self._owners: dict[str, JobSequence] = {}

    @property
    def done(self) -> bool:
        """See JobSource."""
        return all(each.ended for each in self._sequences)

    @property
    def budget_left(self) -> str:
        """See JobSource: that of the sequence that began last."""
        return next((left for each in reversed(self._sequences) if (left := each.budget_left)), "")

    def next_job(self) -> Job | None:
        """See JobSource."""
        for each in self._sequences:
            if (job := each.next_job()) is not None:
                self._owners[job.key] = each
                return job
        return None

    def withdraw(self, key: str) -> Job | None:
        """See JobSource."""
        for each in self._sequences:
            if (job := each.withdraw(key)) is not None:
                self._owners[key] = each
                return job
        return None

    def settle(self) -> None:
        """See JobSource."""
        for each in self._sequences:
            each.settle()

    def finished(self, job: Job) -> None:
        """See JobSource."""
        self._owners.pop(job.key).finished(job)

    def abandon(self) -> None:
        """See JobSource."""
        for each in self._sequences:
            each.abandon()
