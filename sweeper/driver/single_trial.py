"""One trial without a study: probed, checked and trained by the dispatcher of every study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.console import Console

from sweeper.config.settings import TrialSettings, metric_words
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import ArmBaseline, Outcome, TrialSize
from sweeper.driver.arm_probe import run_probe
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.jobs import Job, JobList, JobPhase, LostCause
from sweeper.driver.trial_sizes import recorded
from sweeper.reporting.result_tables import describe_data
from sweeper.tracking.provenance import origin
from sweeper.tracking.tracker import Tracker, TrialRecord, dataset_record
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    Engine,
    EvaluatedEvent,
    SubmitCommand,
    WorkerEvent,
)


@dataclass(eq=False)
class SingleTrial(Job):
    """A trial that belongs to no study."""

    record: TrialRecord
    settings: TrialSettings
    tracker: Tracker
    console: Console
    size: TrialSize | None = None
    outcome: Outcome | None = None
    expected: InputDigests | None = None
    """Digests of the probe, which the training must find again."""
    stoppable: ClassVar[bool] = True

    def run(self, dispatcher: Dispatcher, accept: Callable[[ArmBaseline], None]) -> Outcome:
        """Train the trial to its end.

        Args:
            dispatcher: its workers train.
            accept: called with the facts about data and base. It raises to end before training.

        Raises:
            KeyboardInterrupt: a person or a signal stopped the trial.
            InputsChanged: data or base model were changed after the probe.
            WorkerError: workers cannot start.
        """
        answer = run_probe(dispatcher, "single", self.settings)
        if isinstance(answer, Outcome):
            return answer
        if answer.facts is None:
            return Outcome(cause="refused", message=answer.message)
        self._describe(answer.facts)
        self.expected = answer.facts.inputs
        accept(answer.facts)
        dispatcher.run(JobList([self]))
        assert self.outcome is not None, "the dispatcher runs a job to its outcome"
        return self.outcome

    @property
    def key(self) -> str:
        """See Job."""
        return self.record.key

    def send(self, engine: Engine, worker: int) -> JobPhase:
        """See Job: a check first, then the trial."""
        if self.size is None:
            check = CheckCommand(
                job=self.key,
                attempt=self.attempt,
                settings=self.settings,
                expected=self.expected,
            )
            engine.send(worker, check)
            return JobPhase.CHECKING
        # the run begins after the check, because adapter.trainable_parameters has a rank only then
        self.record = replace(self.record, params=recorded(self.settings, self.size))
        self.tracker.start(self.record)
        engine.send(
            worker,
            SubmitCommand(
                job=self.key,
                attempt=self.attempt,
                folder=self.record.folder.path.resolve(),
                settings=self.settings.with_rank(self.size.rank),
                provenance=dict(self.record.tags),
                expected=self.expected,
            ),
        )
        return JobPhase.RUNNING

    def on_event(self, event: WorkerEvent) -> JobPhase | None:
        """See Job."""
        match event:
            case CheckedEvent():
                self.size, self.outcome = event.size, event.refusal
                return JobPhase.QUEUED if event.refusal is None else JobPhase.ENDED
            case EvaluatedEvent():
                self.tracker.ship(self.record)
                judged = metric_words(self.settings.objective.judged_while_training)
                step = f"step {event.step} of {event.total_steps}"
                self.console.print(f"{step}: {judged} {event.value:.4f}", highlight=False)
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

    def _describe(self, facts: ArmBaseline) -> None:
        """Add the origin of data and base to the record, and print what the trial starts from."""
        self.record = replace(
            self.record,
            tags=origin(self.record.tags, facts),
            dataset=dataset_record(facts, self.settings.data),
        )
        self.console.print(f"data: {describe_data(facts)}", highlight=False, soft_wrap=True)
        for remark in facts.base_remarks:
            self.console.print(f"base: {remark}", highlight=False, soft_wrap=True)
        metric = self.settings.objective.metric
        value = facts.base_value(metric)
        self.console.print(f"Untuned base: {metric_words(metric)} {value:.4f}", highlight=False)
