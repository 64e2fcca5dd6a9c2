"""The jobs of finalists: trainings with further seeds, and judgements on unseen texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sweeper.config.settings import TrialSettings
from sweeper.config.space import Point
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import HeldOutKind, HeldOutLosses, Outcome, stored_outcome
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.trial_identity import TrialIdentity, write_identity
from sweeper.driver.jobs import Job, JobPhase, LostCause
from sweeper.driver.study_services import StudyServices
from sweeper.reporting.finalist_results import FinalistResult, SeedRepeat
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.states import STATES
from sweeper.search.study_plan import ArmPlan
from sweeper.tracking.tracker import TrialRecord
from sweeper.workers.protocol import (
    EndedEvent,
    Engine,
    EvaluatedEvent,
    JudgeCommand,
    JudgedEvent,
    ProgressEvent,
    SubmitCommand,
    WorkerEvent,
)


@dataclass(eq=False)
class FinalistTraining(Job):
    """The training of a finalist with one further seed."""

    record: TrialRecord
    settings: TrialSettings
    view: TrialProgress
    services: StudyServices
    expected: InputDigests
    """Digests that the training must find."""
    identity: TrialIdentity
    outcome: Outcome | None = None
    stoppable: ClassVar[bool] = True

    @property
    def key(self) -> str:
        """See Job: as in "lora/0007_seed_1"."""
        return self.record.key

    @property
    def complete(self) -> bool:
        """True if the training ran to its own end."""
        return self.outcome is not None and STATES[self.outcome.cause].complete

    def send(self, engine: Engine, worker: int) -> JobPhase:
        """See Job."""
        # when it is sent, not when it is claimed: a training that never starts leaves no folder
        write_identity(self.record.folder, self.identity)
        self.view.state = "running"
        self.services.board.add(self.view)
        self.services.tracker.start(self.record)
        engine.send(
            worker,
            SubmitCommand(
                job=self.key,
                attempt=self.attempt,
                folder=self.record.folder.path.resolve(),
                settings=self.settings,
                provenance={**self.record.tags, "attempt": self.attempt},
                expected=self.expected,
            ),
        )
        return JobPhase.RUNNING

    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """See Job."""
        match event:
            case ProgressEvent():
                self.view.progressed(event.step, event.total_steps, event.tokens_per_second)
            case EvaluatedEvent():
                self.view.evaluated(event.value, self.settings.objective)
                self.services.tracker.ship(self.record)
            case EndedEvent():
                self.outcome = event.outcome
                return JobPhase.ENDED
        return None

    def fail(self, cause: LostCause, message: str) -> None:
        """See Job."""
        self.outcome = Outcome(cause=cause, message=message)

    def cancel(self) -> None:
        """See Job."""
        self.outcome = Outcome(cause="cancelled")

    def on_requeued(self, *, paused: bool) -> None:
        """See Job."""
        self.view.stand_still(paused=paused)

    def reuse_outcome(self) -> bool:
        """Take the outcome that an earlier run stored, and return True if there is one."""
        outcome = stored_outcome(self.record.folder)
        if outcome is None:
            return False
        # a cancelled training has an outcome too, and is continued from its checkpoint
        self.outcome = None if STATES[outcome.cause].open else outcome
        return self.outcome is not None


@dataclass(eq=False)
class JudgeJob(Job):
    """The judgement of one model on texts that no search saw."""

    name: str
    settings: TrialSettings
    folder: TrialFolder | None
    """The folder of the judged trial, or None for the untuned base."""
    kinds: tuple[HeldOutKind, ...]
    expected: InputDigests | None = None
    """Digests that the judgement must find."""
    losses: HeldOutLosses | None = None
    problem: str | None = None
    """The reason for no losses."""
    activity: ClassVar[str] = "judging"

    @property
    def key(self) -> str:
        """See Job: as in "lora/0007_untuned"."""
        return self.name

    def send(self, engine: Engine, worker: int) -> JobPhase:
        """See Job."""
        engine.send(
            worker,
            JudgeCommand(
                job=self.key,
                attempt=self.attempt,
                settings=self.settings,
                folder=None if self.folder is None else self.folder.path.resolve(),
                kinds=self.kinds,
                expected=self.expected,
            ),
        )
        return JobPhase.RUNNING

    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """See Job."""
        if not isinstance(event, JudgedEvent):
            return None
        self.losses, self.problem = event.losses, event.message
        return JobPhase.ENDED

    def fail(self, cause: LostCause, message: str) -> None:
        """See Job."""
        self.problem = message


@dataclass
class Candidate:
    """A configuration that may win its arm, with the trainings of its further seeds."""

    arm: ArmPlan
    number: int
    point: Point
    settings: TrialSettings
    asked: TrialSettings
    """The settings before a rank was derived from adapter.trainable_parameters."""
    own: Outcome
    """The outcome of the search's trial."""
    trainings: list[FinalistTraining] = field(default_factory=list)

    def settings_of(self, seed: int) -> TrialSettings:
        """Return the configuration with another seed."""
        return self.settings.model_copy(update={"seed": seed})

    def record(self, folder: StudyFolder) -> TrialRecord:
        """Return the record of the search's trial."""
        name = self.arm.name
        return TrialRecord(f"{name}/{self.number:04d}", folder.trial(name, self.number), {})

    def finalist(self) -> FinalistResult:
        """Return the configuration and its outcomes as a plain value."""
        repeats = [SeedRepeat(seed=self.settings.seed, outcome=self.own)]
        repeats += [SeedRepeat(seed=t.settings.seed, outcome=t.outcome) for t in self.trainings]
        return FinalistResult(number=self.number, repeats=tuple(repeats))
