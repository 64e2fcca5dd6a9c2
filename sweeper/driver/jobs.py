"""Jobs and their sources: the two protocols of everything that the dispatcher hands to workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from sweeper.core.errors import CommandRefused
from sweeper.workers.protocol import Engine, WorkerEvent

MAX_ATTEMPTS = 3
"""Executions of one job before the death of its worker is its outcome. A judgement: two deaths may be
another process's fault, and a third one is the job's."""

LostCause = Literal["crash", "timeout", "oom", "error"]


class JobPhase(Enum):
    """The phases of a job. Only the dispatcher moves a job from one phase to the next.

    A job that needs no check goes from QUEUED to RUNNING to ENDED. One that does is CHECKING first, and
    then QUEUED again. A stop is asked for only in RUNNING: PRUNING, PAUSING and DROPPING say by whom,
    and a drop takes precedence. A loss of the worker and the end of a pause lead back to QUEUED.
    """

    QUEUED = "waits for a free slot"
    CHECKING = "a worker checks whether it is possible"
    RUNNING = "a worker runs it"
    PRUNING = "the pruner has asked it to stop"
    PAUSING = "a pause has asked it to stop, or has ended its worker: it will be continued"
    DROPPING = "a person has asked it to stop for good"
    ENDED = "it has a result"


# without eq a job equals itself alone, and can be hashed
@dataclass(eq=False, kw_only=True)
class Job(ABC):
    """Work that occupies one slot of a worker until it is answered."""

    attempt: int = 1
    phase: JobPhase = JobPhase.QUEUED
    broken_devices: int = 0
    """Attempts after which a worker could not use its GPU any more."""
    worker: int = -1
    """The worker that the current attempt was handed to."""
    stoppable: ClassVar[bool] = False
    """True if a worker that runs the job obeys StopCommand. Other jobs end by themselves or with their
    worker."""
    activity: ClassVar[str] = "running"
    """Words for what a worker does while it runs the job."""

    @property
    def watched(self) -> bool:
        """True if the worker waits at each evaluation until the driver has decided."""
        return False

    @property
    @abstractmethod
    def key(self) -> str:
        """The job's name in the protocol, unique among the jobs of a run, the same in each attempt."""

    @abstractmethod
    def send(self, engine: Engine, worker: int) -> JobPhase:
        """Send the job's next command to a free slot and return CHECKING or RUNNING."""

    @abstractmethod
    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """Take an event of the current attempt.

        Returns:
            ENDED once the job has its result, QUEUED if it needs another slot at once, PRUNING if it
            should be stopped as hopeless, None if nothing changes.
        """

    @abstractmethod
    def fail(self, cause: LostCause, message: str) -> None:
        """Store the result of a job whose last attempt was lost with its worker."""

    def cancel(self) -> None:  # noqa: B027 - most jobs keep no result when they are cancelled
        """Store the result of a job that was cancelled before its end."""

    def on_requeued(self, *, paused: bool) -> None:  # noqa: B027 - few jobs show that they wait
        """React to a return to the queue, after a pause or with a new attempt."""

    def drop(self) -> None:
        """Prepare to be stopped for good.

        Raises:
            CommandRefused: a job of this kind cannot be dropped.
        """
        raise CommandRefused(
            f"{self.key} is not a trial of a search, so it cannot be stopped on its own"
        )


AnyJob = TypeVar("AnyJob", bound=Job)


class JobSource(Protocol[AnyJob]):
    """A supply of jobs that the dispatcher runs to its end."""

    @property
    def done(self) -> bool:
        """True if no further job will come, unless an open one ends without its result.

        Read after `next_job` has returned None.
        """

    @property
    def budget_left(self) -> str:
        """Remaining budget as text, or "" when there is no limit."""

    def next_job(self) -> AnyJob | None:
        """Return the next job to start, or None if there is none at the moment."""

    def withdraw(self, key: str) -> AnyJob | None:
        """Return a job that an earlier run began and `next_job` has not returned yet, or None.

        `next_job` does not return the job any more.
        """

    def settle(self) -> None:
        """Note that all open jobs of a part have ended, without a start of a further job."""

    def finished(self, job: AnyJob) -> None:
        """Take a job that has its result, or that was cancelled and has none.

        Its phase is not ENDED yet. DROPPING says that a person has stopped it.
        """

    def abandon(self) -> None:
        """Record work that was begun but never became a job, after all jobs were cancelled."""


class JobList(Generic[AnyJob]):
    """A source of jobs that are known in advance."""

    def __init__(
        self,
        jobs: Iterable[AnyJob],
        finished: Callable[[AnyJob], None] = lambda job: None,
        refusal: Callable[[], str | None] = lambda: None,
        budget_left: Callable[[], str] = lambda: "",
    ) -> None:
        """
        Args:
            jobs: started in this order.
            finished: called with each job that has ended or was cancelled.
            refusal: asked before each start for the reason to start none, if there is one.
            budget_left: returns the remaining budget as text.
        """
        self._waiting = deque(jobs)
        self._finished = finished
        self._refusal = refusal
        self._budget_left = budget_left
        self.refused: str | None = None
        """The reason why the rest of the jobs was not started."""

    @property
    def done(self) -> bool:
        """See JobSource."""
        return not self._waiting

    @property
    def budget_left(self) -> str:
        """See JobSource."""
        return self._budget_left()

    def next_job(self) -> AnyJob | None:
        """See JobSource."""
        if self._waiting and (refused := self._refusal()) is not None:
            self.refused = refused
            self._waiting.clear()
        return self._waiting.popleft() if self._waiting else None

    def withdraw(self, key: str) -> None:
        """See JobSource: no job of a list was begun by an earlier run."""

    def settle(self) -> None:
        """See JobSource: a list has one part."""

    def finished(self, job: AnyJob) -> None:
        """See JobSource."""
        self._finished(job)

    def abandon(self) -> None:
        """See JobSource: jobs that were not started leave no trace."""
