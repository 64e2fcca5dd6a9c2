"""Finalists: each arm's best configurations over further seeds, and the winners on the test split.

Runs when every search has ended, so that no search sees a figure of the test split. Seeds are trained
through the same engine as trials, but count to no n_trials and are told to no Optuna study. What is
on disk is adopted: an ended training by its outcome.json, a judgement by its file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import optuna
from optuna.trial import TrialState

from sweeper.folders import StudyFolder, TrialFolder, write_atomic
from sweeper.interrupt import Interrupt
from sweeper.outcome import Examples, Facts, Outcome
from sweeper.search.board import Board, TrialView, View
from sweeper.search.budget import ArmBudget, typical_seconds
from sweeper.search.driver import CANCEL_SECONDS, POLL_SECONDS
from sweeper.search.final import COMPLETE, ArmFinal, Final, Finalist, Repeat, choose
from sweeper.search.plan import ArmPlan
from sweeper.search.states import MAX_ATTEMPTS, STATES
from sweeper.search.study import point_of
from sweeper.settings import Finalists, TrialSettings
from sweeper.space import Point
from sweeper.tracking.provenance import origin
from sweeper.tracking.tracker import Tracker, TrialRecord, dataset_record, run_params
from sweeper.workers.protocol import (
    AnyEvent,
    Ended,
    Engine,
    Evaluated,
    Lost,
    Progress,
    Slots,
    Submit,
    Test,
    Tested,
)


class Task(Protocol):
    """Something a worker is handed and answers."""

    attempt: int

    @property
    def key(self) -> str:
        """Its name in the protocol."""

    def hand(self, engine: Engine, worker: int) -> None:
        """Send it."""

    def take(self, event: AnyEvent) -> None:
        """Its answer, or what it tells on the way."""

    def give_up(self, message: str) -> None:
        """Its workers died too often."""


@dataclass
class Training:
    """A finalist's training with one further seed."""

    record: TrialRecord
    settings: TrialSettings
    view: TrialView
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
            Submit(
                trial=self.key,
                attempt=self.attempt,
                folder=self.record.folder.path.resolve(),
                settings=self.settings,
                provenance={**self.record.tags, "attempt": self.attempt},
            ),
        )

    def take(self, event: AnyEvent) -> None:
        """See Task."""
        match event:
            case Progress():
                self.view.progressed(event.step, event.total_steps, event.tokens_per_second)
            case Evaluated():
                self.view.evaluated(event.value, self.settings.objective)
            case Ended():
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
class Judging:
    """One model's judgement on the test split."""

    key: str
    settings: TrialSettings
    folder: TrialFolder | None
    attempt: int = 1
    examples: Examples | None = None
    problem: str | None = None

    def hand(self, engine: Engine, worker: int) -> None:
        """See Task."""
        folder = None if self.folder is None else self.folder.path.resolve()
        test = Test(trial=self.key, attempt=self.attempt, settings=self.settings, folder=folder)
        engine.test(worker, test)

    def take(self, event: AnyEvent) -> None:
        """See Task."""
        if isinstance(event, Tested):
            self.examples, self.problem = event.examples, event.message

    def give_up(self, message: str) -> None:
        """See Task."""
        self.problem = message


@dataclass
class Candidate:
    """A configuration while its seeds are trained."""

    arm: ArmPlan
    number: int
    point: Point
    settings: TrialSettings
    own: Outcome
    """Of the search's trial."""
    trainings: list[Training] = field(default_factory=list)

    def settings_of(self, seed: int) -> TrialSettings:
        """The configuration with another seed."""
        return self.settings.model_copy(update={"seed": seed})

    def finalist(self) -> Finalist:
        """As a value."""
        repeats = [Repeat(seed=self.settings.seed, outcome=self.own)]
        repeats += [Repeat(seed=t.settings.seed, outcome=t.outcome) for t in self.trainings]
        return Finalist(number=self.number, repeats=tuple(repeats))


@dataclass
class FinalistsDriver:
    """Trains and judges the finalists of all arms. `slots` (worker -> free slots) is the session's."""

    wanted: Finalists
    folder: StudyFolder
    budget: ArmBudget
    engine: Engine
    tracker: Tracker
    view: View
    board: Board
    provenance: Mapping[str, str]
    slots: dict[int, int]
    interrupt: Interrupt
    _live: dict[str, Task] = field(default_factory=dict)

    def run(self, arms: Sequence[tuple[ArmPlan, optuna.Study]]) -> dict[str, ArmFinal]:
        """By arm; arms without a complete trial are left out.

        Raises:
            KeyboardInterrupt: after the running trainings were stopped; the same command goes on.
        """
        finals = {}
        for arm, study in arms:
            candidates = self._candidates(arm, study)
            if candidates:
                facts = _facts(study)
                self._train(arm, candidates, facts)
                finalists = tuple(candidate.finalist() for candidate in candidates)
                winner = choose(finalists, arm.settings.objective.direction)
                final = Final(finalists=finalists, winner=winner)
                chosen = next(each for each in candidates if each.number == winner)
                finals[arm.name] = self._test(chosen, final, facts)
        return finals

    def _candidates(self, arm: ArmPlan, study: optuna.Study) -> list[Candidate]:
        """The best complete trials, each with the trainings that its further seeds need."""
        minimize = arm.settings.objective.direction == "minimize"
        found: list[tuple[float, int, Point, Outcome]] = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            outcome = Outcome.model_validate(trial.user_attrs["outcome"])
            if outcome.cause in COMPLETE and outcome.best_value is not None:
                worth = outcome.best_value if minimize else -outcome.best_value
                found.append((worth, trial.number, point_of(trial), outcome))
        best = sorted(found, key=lambda item: item[:2])[: self.wanted.top]
        candidates = [
            Candidate(arm, number, point, arm.settings_at(point).trial, outcome)
            for _, number, point, outcome in best
        ]
        for candidate in candidates:
            first = candidate.settings.seed
            seeds = range(first + 1, first + self.wanted.seeds)
            candidate.trainings = [self._training(candidate, study, seed) for seed in seeds]
        return candidates

    def _training(self, candidate: Candidate, study: optuna.Study, seed: int) -> Training:
        arm, number, settings = candidate.arm, candidate.number, candidate.settings_of(seed)
        key = f"{arm.name}/{number:04d}_seed_{seed}"
        facts = _facts(study)
        tags = {
            **{"arm": arm.name, "finalist": f"{arm.name}/{number:04d}"},
            **origin(self.provenance, facts),
        }
        params = run_params(settings, candidate.point)
        dataset = dataset_record(facts, settings.data)
        folder = self.folder.finalist(arm.name, number, seed)
        record = TrialRecord(key, folder, params, tags, dataset)
        view = TrialView(key=key, arm=_title(arm), number=number, point=candidate.point)
        return Training(record, settings, view)

    def _train(self, arm: ArmPlan, candidates: Sequence[Candidate], facts: Facts) -> None:
        trainings = [training for each in candidates for training in each.trainings]
        missing = [training for training in trainings if not training.adopt()]
        if missing:
            numbers = ", ".join(str(each.number) for each in candidates)
            self.view.event(
                f"arm {arm.name}: finalists are the configurations of trial {numbers}; "
                f"{len(missing)} to be trained with further seeds"
            )
            base_value = facts.base_value(arm.settings.objective.metric)
            self.board.open_arm(_title(arm), len(trainings), base_value)
        for training in trainings:
            if training.outcome is not None:
                self._record(training)
        costs = [each.own.metrics.get("cost/seconds", 0.0) for each in candidates]
        refusal = self._share_out(missing, lambda: self._refusal(typical_seconds(costs)))
        if refusal is not None:
            left = sum(training.outcome is None for training in trainings)
            self.view.event(f"arm {arm.name}: {left} of its finalists' seeds left out: {refusal}")

    def _refusal(self, typical: float) -> str | None:
        now = self.budget.clock()
        return self.budget.refusal([now] * len(self._live), typical, [])

    def _test(self, chosen: Candidate, final: Final, facts: Facts) -> ArmFinal:
        """Judge the winner's seeds and its base on the test split, if there is one."""
        if not facts.rows.get("test", 0):
            return ArmFinal(final)
        name, number = chosen.arm.name, chosen.number
        judgings = {chosen.settings.seed: (self.folder.trial(name, number), chosen.settings)}
        for training in chosen.trainings:
            if training.outcome is not None and training.outcome.cause in COMPLETE:
                judgings[training.settings.seed] = (training.record.folder, training.settings)
        untuned = Judging(f"{name}/{number:04d}_untuned", chosen.settings, None)
        seeds = {
            seed: Judging(f"{name}/{number:04d}_seed_{seed}", settings, folder)
            for seed, (folder, settings) in judgings.items()
        }
        self._judge(name, [untuned, *seeds.values()])
        tested = {seed: judging.examples for seed, judging in seeds.items() if judging.examples}
        figures = {
            "test_losses": {seed: examples.loss for seed, examples in tested.items()},
            "untuned_test_loss": untuned.examples and untuned.examples.loss,
        }
        return ArmFinal(final.model_copy(update=figures), tested, untuned.examples)

    def _judge(self, arm: str, judgings: Sequence[Judging]) -> None:
        files = {
            judging.key: self.folder.test_examples(arm, f"trial_{judging.key.split('/')[-1]}")
            for judging in judgings
        }
        for judging in judgings:
            if (path := files[judging.key]).exists():
                judging.examples = Examples.model_validate_json(path.read_text(encoding="utf-8"))
        missing = [judging for judging in judgings if judging.examples is None]
        if missing:
            self.view.event(f"arm {arm}: judging the winner on the test split")
        self._share_out(missing, lambda: None)
        for judging in missing:
            if judging.examples is None:
                reason = (judging.problem or "no answer").splitlines()[-1]
                self.view.event(f"{judging.key} is left out of the test: {reason}")
            else:
                write_atomic(files[judging.key], judging.examples.model_dump_json())

    def _share_out(self, tasks: Sequence[Task], refusal: Callable[[], str | None]) -> str | None:
        """Hand tasks to free slots until all are answered, or until no more may be started (why)."""
        waiting, refused = deque(tasks), None
        try:
            while waiting or self._live:
                self.interrupt.check()
                for worker in [worker for worker, free in self.slots.items() for _ in range(free)]:
                    refused = refused or (refusal() if waiting else None)
                    if refused is None and waiting:
                        self._hand(waiting.popleft(), worker)
                if refused is not None:
                    waiting.clear()
                if event := self.engine.next_event(POLL_SECONDS):
                    waiting.extend(self._handle(event))
                    self.view.update(self.board)
        except KeyboardInterrupt:
            self._cancel()
            raise
        return refused

    def _hand(self, task: Task, worker: int) -> None:
        self.slots[worker] -= 1
        self._live[task.key] = task
        if isinstance(task, Training):
            self.board.add(task.view)
            self.tracker.start(task.record)
        task.hand(self.engine, worker)

    def _handle(self, event: AnyEvent) -> list[Task]:
        """Take an event; a task whose worker died comes back, to be handed out again."""
        if isinstance(event, Slots):
            self.slots[event.worker] = event.free
        elif isinstance(event, Lost):
            return self._lost(event)
        elif isinstance(event, Progress | Evaluated):
            if task := self._live.get(event.trial):
                task.take(event)
        elif isinstance(event, Ended | Tested) and (task := self._live.pop(event.trial, None)):
            task.take(event)
            self._answered(task)
        return []

    def _lost(self, event: Lost) -> list[Task]:
        self.slots.pop(event.worker, None)  # its successor announces itself
        task = self._live.pop(event.trial or "", None)
        if task is None:
            return []
        self.view.event(f"{task.key}: {event.message.splitlines()[0]}")
        if task.attempt < MAX_ATTEMPTS:
            task.attempt += 1
            return [task]
        task.give_up(event.message)
        self._answered(task)
        return []

    def _answered(self, task: Task) -> None:
        if not isinstance(task, Training):
            return
        assert task.outcome is not None
        self.budget.ended.append(task.outcome.metrics.get("cost/seconds", 0.0))
        self._record(task)
        left_out = (
            "" if task.outcome.cause in COMPLETE else "; left out of its configuration's mean"
        )
        self.view.event(task.view.summary(task.outcome, task.settings.objective.metric) + left_out)

    def _record(self, training: Training) -> None:
        outcome = training.outcome
        assert outcome is not None
        training.view.ended(outcome)
        self.board.add(training.view)
        status = STATES[outcome.cause].status or "KILLED"
        self.tracker.end(training.record, status, outcome.metrics, {"cause": outcome.cause})

    def _cancel(self) -> None:
        """Stop what is trained and wait a moment for it; judgements end with their workers."""
        trainings = [task for task in self._live.values() if isinstance(task, Training)]
        self._live = {task.key: task for task in trainings}
        for key in self._live:
            self.engine.stop(key, "cancelled")
        waited = 0.0
        while self._live and waited < CANCEL_SECONDS:
            event = self.engine.next_event(POLL_SECONDS)
            waited += POLL_SECONDS if event is None else 0.0
            if isinstance(event, Ended):
                self._handle(event)
        for training in trainings:
            if training.outcome is None:
                training.outcome = Outcome(cause="cancelled")
                self._record(training)
        self._live.clear()


def _title(arm: ArmPlan) -> str:
    return f"{arm.name} finalists"


def _facts(study: optuna.Study) -> Facts:
    return Facts.model_validate(study.user_attrs["facts"])
