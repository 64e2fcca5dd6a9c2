"""What finalists ask of workers: trainings with further seeds, and judgements on unseen texts.

Each knows how it is handed out and what its answer is; in which order, and what comes of it, the driver
of the finalists knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from sweeper.config.settings import TrialSettings
from sweeper.config.space import Point
from sweeper.core.outcome import HeldOutKind, HeldOutLosses, Outcome
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.reporting.finalist_results import FinalistResult, SeedRepeat
from sweeper.reporting.study_progress import TrialProgress
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


class FinalistTask(Protocol):
    """Something a worker is handed and answers."""

    attempt: int

    @property
    def key(self) -> str:
        """Its name in the protocol."""

    def hand(self, engine: Engine, worker: int) -> None:
        """Send it."""

    def take(self, event: WorkerEvent) -> None:
        """Its answer, or what it tells on the way."""

    def give_up(self, message: str) -> None:
        """Its workers died too often."""


@dataclass
class SeedTraining:
    """A finalist's training with one further seed."""

    record: TrialRecord
    settings: TrialSettings
    view: TrialProgress
    attempt: int = 1
    outcome: Outcome | None = None

    @property
    def key(self) -> str:
        """lora/0007_seed_1."""
        return self.record.key

    def hand(self, engine: Engine, worker: int) -> None:
        """See Task."""
        self.view.state = "running"
        engine.submit(
            worker,
            SubmitCommand(
                trial=self.key,
                attempt=self.attempt,
                folder=self.record.folder.path.resolve(),
                settings=self.settings,
                provenance={**self.record.tags, "attempt": self.attempt},
            ),
        )

    def take(self, event: WorkerEvent) -> None:
        """See Task."""
        match event:
            case ProgressEvent():
                self.view.progressed(event.step, event.total_steps, event.tokens_per_second)
            case EvaluatedEvent():
                self.view.evaluated(event.value, self.settings.objective)
            case EndedEvent():
                self.outcome = event.outcome

    def give_up(self, message: str) -> None:
        """See Task."""
        self.outcome = Outcome(cause="crash", message=message)

    def adopt(self) -> bool:
        """Take over what an earlier run trained to an end that the same settings reach again."""
        stored = self.record.folder.outcome
        if not stored.exists():
            return False
        outcome = Outcome.model_validate_json(stored.read_text(encoding="utf-8"))
        self.outcome = None if outcome.cause == "cancelled" else outcome
        return self.outcome is not None


@dataclass
class HeldOutJudging:
    """One model's judgement on what no search saw."""

    key: str
    settings: TrialSettings
    folder: TrialFolder | None
    kinds: tuple[HeldOutKind, ...]
    attempt: int = 1
    losses: HeldOutLosses | None = None
    problem: str | None = None

    def hand(self, engine: Engine, worker: int) -> None:
        """See Task."""
        folder = None if self.folder is None else self.folder.path.resolve()
        engine.test(
            worker,
            JudgeCommand(
                trial=self.key,
                attempt=self.attempt,
                settings=self.settings,
                folder=folder,
                kinds=self.kinds,
            ),
        )

    def take(self, event: WorkerEvent) -> None:
        """See Task."""
        if isinstance(event, JudgedEvent):
            self.losses, self.problem = event.losses, event.message

    def give_up(self, message: str) -> None:
        """See Task."""
        self.problem = message


@dataclass
class FinalistCandidate:
    """A configuration while its seeds are trained."""

    arm: ArmPlan
    number: int
    point: Point
    settings: TrialSettings
    own: Outcome
    """Of the search's trial."""
    trainings: list[SeedTraining] = field(default_factory=list)

    def settings_of(self, seed: int) -> TrialSettings:
        """The configuration with another seed."""
        return self.settings.model_copy(update={"seed": seed})

    def record(self, folder: StudyFolder) -> TrialRecord:
        """Of the search's trial."""
        name = self.arm.name
        return TrialRecord(f"{name}/{self.number:04d}", folder.trial(name, self.number), {})

    def finalist(self) -> FinalistResult:
        """As a value."""
        repeats = [SeedRepeat(seed=self.settings.seed, outcome=self.own)]
        repeats += [SeedRepeat(seed=t.settings.seed, outcome=t.outcome) for t in self.trainings]
        return FinalistResult(number=self.number, repeats=tuple(repeats))
