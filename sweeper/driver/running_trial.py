"""A trial of a search as a job: checked, trained, watched by the pruner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from optuna.trial import Trial

from sweeper.config.settings import RunSettings, metric_words
from sweeper.config.space import Point
from sweeper.core.outcome import Outcome, TrialSize
from sweeper.core.trial_identity import TrialIdentity, write_identity
from sweeper.driver.arm_context import ArmContext
from sweeper.driver.jobs import Job, JobPhase, LostCause
from sweeper.driver.trial_sizes import KnownSizes, decided, recorded
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.pruning import PruningGuard, as_told, audited
from sweeper.search.study import AUDITED, DROPPED, HOPELESS_AT
from sweeper.tracking.tracker import TrialRecord
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    Engine,
    EvaluatedEvent,
    ProgressEvent,
    SubmitCommand,
    WorkerEvent,
)


@dataclass
class WorkTimer:
    """Measures a trial's seconds of work in all its attempts by the budget's clock."""

    clock: Callable[[], float]
    started: float = 0.0
    """The moment at which the work would have begun without waits, or 0 before its begin."""
    _before_wait: float = 0.0
    _waits: bool = False

    def start(self) -> None:
        """Start or continue."""
        self.started, self._waits = self.clock() - self._before_wait, False

    def pause(self) -> None:
        """Stand still until the next start."""
        self._before_wait, self._waits = self.seconds, True

    @property
    def seconds(self) -> float:
        """Seconds of work so far."""
        if self._waits or not self.started:
            return self._before_wait
        return self.clock() - self.started


@dataclass(eq=False)
class PreparedTrial:
    """A trial that was asked and whose point is valid."""

    trial: Trial
    point: Point
    settings: RunSettings
    record: TrialRecord
    identity: TrialIdentity
    view: TrialProgress
    guard: PruningGuard
    """Decides when the trial is hopeless."""


@dataclass(eq=False)
class RunningTrial(Job):
    """A trial between ask and tell."""

    context: ArmContext
    prepared: PreparedTrial
    sizes: KnownSizes
    timer: WorkTimer
    audited: bool = False
    """True if the pruner would have stopped it, and it continues to find out whether that is right."""
    hopeless_at: int | None = None
    """The step at which the pruner stopped it. An attempt that is lost before the end keeps it."""
    outcome: Outcome | None = None
    stoppable: ClassVar[bool] = True

    @property
    def key(self) -> str:
        """See Job: the key of the trial's record, as in "lora/0007"."""
        return self.prepared.record.key

    @property
    def watched(self) -> bool:
        """See Job: the pruner decides at each evaluation."""
        # several objectives have no intermediate values, and nothing of them is pruned
        return not self.context.costs and self.context.pruner.name != "none"

    def send(self, engine: Engine, worker: int) -> JobPhase:
        """See Job: a check if the trial's size is not known yet, else the trial."""
        settings, adopted = self.prepared.settings, self.context.adopted
        size = self.sizes.size(settings)
        if size is None and adopted is None:
            check = CheckCommand(
                job=self.key,
                attempt=self.attempt,
                settings=settings.trial,
                expected=self.context.inputs(settings.trial),
            )
            engine.send(worker, check)
            return JobPhase.CHECKING
        if size is not None:  # an adopted model has none, because it is not trained
            self._take_size(size)
        # stored before the worker starts: attempts that end with the driver count as well
        self.prepared.trial.set_user_attr("attempt", self.attempt)
        write_identity(self.prepared.record.folder, self.prepared.identity)
        self.prepared.view.state = "running"
        self.timer.start()
        self.context.services.tracker.start(self.prepared.record)
        engine.send(
            worker,
            SubmitCommand(
                job=self.key,
                attempt=self.attempt,
                folder=self.prepared.record.folder.path.resolve(),
                settings=settings.trial.with_rank(None if size is None else size.rank),
                provenance={**self.context.origin, "attempt": self.attempt},
                adopted=None if adopted is None else adopted.model,
                watched=self.watched,
                expected=self.context.inputs(settings.trial),
            ),
        )
        return JobPhase.RUNNING

    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """See Job."""
        view = self.prepared.view
        match event:
            case ProgressEvent():
                view.progressed(event.step, event.total_steps, event.tokens_per_second)
            case EvaluatedEvent():
                return self._evaluated(event)
            case CheckedEvent():
                return self._checked(event)
            case EndedEvent():
                self.outcome = event.outcome
                return JobPhase.ENDED
        return None

    def fail(self, cause: LostCause, message: str) -> None:
        """See Job."""
        # also after a check: the death of a worker is no property of the point. Attempts that ended
        # with a check have not been stored yet
        self.prepared.trial.set_user_attr("attempt", self.attempt)
        self.outcome = Outcome(cause=cause, message=message, steps=self.prepared.view.step)

    def cancel(self) -> None:
        """See Job."""
        self.outcome = Outcome(cause="cancelled")

    def on_requeued(self, *, paused: bool) -> None:
        """See Job: after a pause the attempt continues from its checkpoint."""
        self.timer.pause()
        self.prepared.view.stand_still(paused=paused)

    def drop(self) -> None:
        """See Job: stored first, so that a killed driver drops the trial when it starts again."""
        self.prepared.trial.set_user_attr(DROPPED, True)

    def _checked(self, event: CheckedEvent) -> JobPhase:
        self.outcome = event.refusal
        answer = event.size or event.refusal
        assert answer is not None, f"the check of {self.key} has neither a size nor a refusal"
        self.sizes.learn(self.prepared.settings, answer)
        return JobPhase.QUEUED if event.refusal is None else JobPhase.ENDED

    def _take_size(self, size: TrialSize) -> None:
        prepared = self.prepared
        params = recorded(prepared.settings.trial, size, prepared.point)
        prepared.record = replace(prepared.record, params=params)
        if sized := decided(prepared.settings, size):
            prepared.trial.set_user_attr("sized", sized)
            prepared.view.point = {**prepared.point, "adapter.r": sized["rank"]}

    def _evaluated(self, event: EvaluatedEvent) -> JobPhase | None:
        view, objective = self.prepared.view, self.context.objective
        view.step, view.total_steps = event.step, event.total_steps
        view.evaluated(event.value, objective)
        self.context.services.tracker.ship(self.prepared.record)
        told = as_told(objective, event.value)  # Optuna has one direction for all values
        hopeless = self.prepared.guard.evaluated(event.step, event.total_steps, told)
        if self.hopeless_at is not None and event.step >= self.hopeless_at:
            hopeless = True
        # the guard sees every evaluation, but a trial that stops for good is not stopped again. One that
        # stops for a pause is: when it continues, this evaluation is over
        if not hopeless or self.audited or self.phase not in (JobPhase.RUNNING, JobPhase.PAUSING):
            return None
        return self._prune_or_audit(event)

    def _prune_or_audit(self, event: EvaluatedEvent) -> JobPhase | None:
        pruner, announce = self.context.pruner, self.context.services.view.event
        self.audited = audited(pruner, self.context.arm.sampler.seed, self.key)
        if self.audited:
            self.prepared.trial.set_user_attr(AUDITED, True)
            announce(f"{self.key}: the pruner would stop it. Kept running as an audit trial")
            return None
        # stored first: whoever continues the trial after a kill stops it at the same step
        self.prepared.trial.set_user_attr(HOPELESS_AT, event.step)
        self.hopeless_at = event.step
        judged = metric_words(self.context.objective.judged_while_training)
        announce(
            f"{self.key} pruned at step {event.step} of {event.total_steps}: {judged} "
            f"{event.value:.4f}, worse than the other trials at this point (pruner={pruner.name})"
        )
        return JobPhase.PRUNING
