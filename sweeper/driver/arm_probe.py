"""The probe of an arm: its facts and its untuned base, from a worker that has loaded the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import StudyError
from sweeper.core.outcome import ArmBaseline, Outcome
from sweeper.core.value import MemoryShortfall
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.jobs import Job, JobList, JobPhase, LostCause
from sweeper.workers.protocol import Engine, ProbeCommand, ProbedEvent, WorkerEvent


@dataclass(eq=False)
class ProbeJob(Job):
    """A request for the facts about an arm."""

    name: str
    settings: TrialSettings
    adopted: Path | None = None
    """An earlier run's model that is judged instead of any training."""
    answer: ProbedEvent | None = None
    lost: Outcome | None = None
    """The outcome of a probe that no worker survived."""
    activity: ClassVar[str] = "loading base and data"

    @property
    def key(self) -> str:
        """See Job: as in "lora probe"."""
        return f"{self.name} probe"

    def send(self, engine: Engine, worker: int) -> JobPhase:
        """See Job."""
        probe = ProbeCommand(
            job=self.key, attempt=self.attempt, settings=self.settings, adopted=self.adopted
        )
        engine.send(worker, probe)
        return JobPhase.RUNNING

    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """See Job."""
        if not isinstance(event, ProbedEvent):
            return None
        self.answer = event
        return JobPhase.ENDED

    def fail(self, cause: LostCause, message: str) -> None:
        """See Job."""
        self.lost = Outcome(cause=cause, message=message)


def run_probe(dispatcher: Dispatcher, name: str, settings: TrialSettings) -> ProbedEvent | Outcome:
    """Return a worker's answer to a probe, or the outcome of a probe that has no answer.

    The outcome is `cancelled` if the study's time ended before the answer.

    Args:
        dispatcher: its workers answer.
        name: the arm's.
        settings: of any trial of the arm.
    """
    job = ProbeJob(name, settings)
    dispatcher.run(JobList([job]))
    return job.answer or job.lost or Outcome(cause="cancelled", message="the time is used up")


def facts_found(probe: ProbeJob) -> ArmBaseline | MemoryShortfall | None:
    """Return the facts about an arm that an ended probe found, or the memory that its trainings lack.

    Returns None if the study's time ended before the answer.

    Raises:
        StudyError: there are no facts, for instance because the base model cannot be had, or because the
            worker died in every attempt.
    """
    if probe.lost is not None:
        # Not a WorkerError, after which nothing is cancelled: the trials of another arm may still run
        raise StudyError(
            "the worker died each time that it loaded the base model and the data:\n"
            f"{probe.lost.message}"
        )
    answer = probe.answer
    if answer is None:
        return None
    if answer.misfit is not None:
        return answer.misfit
    if answer.facts is None:
        raise StudyError(f"arm {probe.name}: {answer.message}")
    return answer.facts
