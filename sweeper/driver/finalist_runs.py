"""Finalists: each arm's best configurations over further seeds, and the winners on unseen texts.

Runs when every search has ended, so that no search sees a figure of the test split. Seeds are trained
through the same engine as trials, but count to no n_trials and are told to no Optuna study. What is
on disk is adopted: an ended training by its outcome.json, a judgement by its file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.settings import FinalistSettings
from sweeper.core.errors import CommandRefused
from sweeper.core.outcome import ArmBaseline, ExampleLosses, HeldOutKind, HeldOutLosses, Outcome
from sweeper.core.paths import write_atomic
from sweeper.driver.arm_search import CANCEL_SECONDS, POLL_SECONDS
from sweeper.driver.budget import ArmBudget, typical_seconds
from sweeper.driver.finalist_jobs import (
    FinalistCandidate,
    FinalistTask,
    HeldOutJudging,
    SeedTraining,
)
from sweeper.driver.loop_context import LoopContext
from sweeper.driver.steering import Steering
from sweeper.driver.trial_sizes import recorded
from sweeper.reporting.finalist_results import (
    COMPLETE,
    ArmConclusion,
    FinalistRanking,
    choose,
    unseen_metrics,
)
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.states import MAX_ATTEMPTS, STATES
from sweeper.search.study import settings_of, shown_point
from sweeper.search.study_plan import ArmPlan
from sweeper.tracking.provenance import origin
from sweeper.tracking.tracker import TrialRecord, dataset_record
from sweeper.workers.protocol import (
    EndedEvent,
    EvaluatedEvent,
    JudgedEvent,
    LostEvent,
    ProgressEvent,
    SlotsEvent,
    WorkerEvent,
)


@dataclass
class FinalistsDriver:
    """Trains and judges the finalists of all arms."""

    wanted: FinalistSettings
    budget: ArmBudget
    context: LoopContext
    steering: Steering
    _live: dict[str, FinalistTask] = field(default_factory=dict)
    _workers: dict[str, int] = field(default_factory=dict)
    """Which worker a live task was handed to."""
    _aside: set[str] = field(default_factory=set)
    """Trainings that were asked to stop, to be continued after a pause."""

    def run(self, arms: Sequence[tuple[ArmPlan, optuna.Study]]) -> dict[str, ArmConclusion]:
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
                final = FinalistRanking(finalists=finalists, winner=winner)
                chosen = next(each for each in candidates if each.number == winner)
                finals[arm.name] = self._test(chosen, final, facts)
        return finals

    def training(self) -> dict[str, int]:
        """See Steered; judgements are no trainings, but they keep workers busy as well."""
        return {key: self._workers[key] for key in self._live}

    def set_aside(self) -> None:
        """See Steered; a judgement is short: it ends, or begins anew."""
        for key in self._live:
            self._aside.add(key)
            self.context.engine.stop(key, "cancelled")

    def drop(self, key: str) -> str:
        """See Steered."""
        raise CommandRefused(
            "every search of this study has ended; finalists are trained to their end"
        )

    def _candidates(self, arm: ArmPlan, study: optuna.Study) -> list[FinalistCandidate]:
        """The best complete trials, each with the trainings that its further seeds need."""
        minimize = arm.settings.objective.direction == "minimize"
        found: list[tuple[float, int, FrozenTrial, Outcome]] = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            outcome = Outcome.model_validate(trial.user_attrs["outcome"])
            if outcome.cause in COMPLETE and outcome.best_value is not None:
                worth = outcome.best_value if minimize else -outcome.best_value
                found.append((worth, trial.number, trial, outcome))
        best = sorted(found, key=lambda item: item[:2])[: self.wanted.top]
        candidates = [
            FinalistCandidate(arm, number, shown_point(trial), settings_of(arm, trial), outcome)
            for _, number, trial, outcome in best
        ]
        for candidate in candidates:
            first = candidate.settings.seed
            further = 0 if arm.run_id else self.wanted.seeds - 1  # nobody trains what was adopted
            seeds = range(first + 1, first + 1 + further)
            candidate.trainings = [self._training(candidate, study, seed) for seed in seeds]
        return candidates

    def _training(
        self, candidate: FinalistCandidate, study: optuna.Study, seed: int
    ) -> SeedTraining:
        arm, number, settings = candidate.arm, candidate.number, candidate.settings_of(seed)
        key = f"{arm.name}/{number:04d}_seed_{seed}"
        facts = _facts(study)
        tags = {
            **{"arm": arm.name, "finalist": f"{arm.name}/{number:04d}"},
            **origin(self.context.provenance, facts),
        }
        folder = self.context.folder.finalist(arm.name, number, seed)
        params = recorded(settings, searched=candidate.point)
        record = TrialRecord(key, folder, params, tags, dataset_record(facts, settings.data))
        view = TrialProgress(key=key, arm=_title(arm), number=number, point=candidate.point)
        return SeedTraining(record, settings, view)

    def _train(
        self, arm: ArmPlan, candidates: Sequence[FinalistCandidate], facts: ArmBaseline
    ) -> None:
        trainings = [training for each in candidates for training in each.trainings]
        missing = [training for training in trainings if not training.adopt()]
        if missing:
            numbers = ", ".join(str(each.number) for each in candidates)
            self.context.view.event(
                f"arm {arm.name}: finalists are the configurations of trial {numbers}; "
                f"{len(missing)} to be trained with further seeds"
            )
            base_value = facts.base_value(arm.settings.objective.metric)
            self.context.board.open_arm(_title(arm), len(trainings), base_value)
        for training in trainings:
            if training.outcome is not None:
                self._record(training)
        costs = [each.own.metrics.get("cost/seconds", 0.0) for each in candidates]
        refusal = self._share_out(missing, lambda: self._refusal(typical_seconds(costs)))
        if refusal is not None:
            left = sum(training.outcome is None for training in trainings)
            self.context.view.event(
                f"arm {arm.name}: {left} of its finalists' seeds left out: {refusal}"
            )

    def _refusal(self, typical: float) -> str | None:
        now = self.budget.clock()
        return self.budget.refusal([now] * len(self._live), typical, [])

    def _test(
        self, chosen: FinalistCandidate, final: FinalistRanking, facts: ArmBaseline
    ) -> ArmConclusion:
        """Judge the winner's seeds and its base on the test split and general text, if there are."""
        kinds = self._kinds(facts)
        if not kinds:
            return ArmConclusion(final)
        name, number = chosen.arm.name, chosen.number
        judgings = {
            chosen.settings.seed: (self.context.folder.trial(name, number), chosen.settings)
        }
        for training in chosen.trainings:
            if training.outcome is not None and training.outcome.cause in COMPLETE:
                judgings[training.settings.seed] = (training.record.folder, training.settings)
        untuned = HeldOutJudging(f"{name}/{number:04d}_untuned", chosen.settings, None, kinds)
        seeds = {
            seed: HeldOutJudging(f"{name}/{number:04d}_seed_{seed}", settings, folder, kinds)
            for seed, (folder, settings) in judgings.items()
        }
        files = {
            judging.key: self._files(name, facts, judging) for judging in (untuned, *seeds.values())
        }
        self._judge(name, [untuned, *seeds.values()], files)
        found = {seed: judging.losses for seed, judging in seeds.items() if judging.losses}
        ended = ArmConclusion.judged(final, found, untuned.losses or HeldOutLosses())
        records = {training.settings.seed: training.record for training in chosen.trainings}
        for seed in found:
            record = records.get(seed) or chosen.record(self.context.folder)
            self._record_unseen(record, ended, seed, files[seeds[seed].key])
        return ended

    def _kinds(self, facts: ArmBaseline) -> tuple[HeldOutKind, ...]:
        """The unseen texts that there are, and that may be read."""
        tested = self.wanted.test and facts.rows.get("test", 0)
        general = facts.general_digest is not None
        return (*(("test",) if tested else ()), *(("general",) if general else ()))

    def _files(
        self, arm: str, facts: ArmBaseline, judging: HeldOutJudging
    ) -> dict[HeldOutKind, Path]:
        """Where a model's losses on each kind of text are kept."""
        name = f"trial_{judging.key.split('/')[-1]}"
        digest = facts.general_digest or ""
        files: dict[HeldOutKind, Path] = {
            "test": self.context.folder.test_examples(arm, name),
            "general": self.context.folder.general_examples(arm, digest, name),
        }
        return {kind: files[kind] for kind in judging.kinds}

    def _judge(
        self,
        arm: str,
        judgings: Sequence[HeldOutJudging],
        files: Mapping[str, Mapping[HeldOutKind, Path]],
    ) -> None:
        """What was judged before is read; the rest is judged, and kept for the next time."""
        stored = {judging.key: _stored(files[judging.key]) for judging in judgings}
        for judging in judgings:
            if len(stored[judging.key]) == len(files[judging.key]):
                judging.losses = HeldOutLosses(**stored[judging.key])
        missing = [judging for judging in judgings if judging.losses is None]
        if missing:
            kinds = {"test": "the test split", "general": "general text"}
            words = " and ".join(kinds[kind] for kind in files[missing[0].key])
            self.context.view.event(f"arm {arm}: judging the winner on {words}")
        self._share_out(missing, lambda: None)
        for judging in missing:
            if judging.losses is None:
                reason = (judging.problem or "no answer").splitlines()[-1]
                self.context.view.event(f"{judging.key} is left out of the test: {reason}")
                continue
            judging.losses = judging.losses.model_copy(update=stored[judging.key])
            for kind, path in files[judging.key].items():
                if (examples := getattr(judging.losses, kind)) is not None:
                    write_atomic(path, examples.model_dump_json())

    def _record_unseen(
        self,
        record: TrialRecord,
        ended: ArmConclusion,
        seed: int,
        files: Mapping[HeldOutKind, Path],
    ) -> None:
        """Add a seed's figures to its run, dated by the files, so that a repeat adds nothing."""
        final = ended.final
        metrics = unseen_metrics(
            final.test_losses.get(seed),
            final.general_losses.get(seed),
            final.untuned_general_loss,
        )
        judged_at = max(path.stat().st_mtime for path in files.values())
        self.context.tracker.amend(record, metrics, judged_at)

    def _share_out(
        self, tasks: Sequence[FinalistTask], refusal: Callable[[], str | None]
    ) -> str | None:
        """Hand tasks to free slots until all are answered, or until no more may be started (why)."""
        waiting, refused = deque(tasks), None
        try:
            while waiting or self._live:
                self.steering.read(self)
                self.context.interrupt.check()
                for worker in [] if self.steering.holds else self._free_slots():
                    refused = refused or (refusal() if waiting else None)
                    if refused is None and waiting:
                        self._hand(waiting.popleft(), worker)
                if refused is not None:
                    waiting.clear()
                if event := self.context.engine.next_event(POLL_SECONDS):
                    waiting.extend(self._handle(event))
                    self.context.view.update(self.context.board)
        except KeyboardInterrupt:
            self._cancel()
            raise
        return refused

    def _free_slots(self) -> list[int]:
        return [worker for worker, free in self.context.slots.items() for _ in range(free)]

    def _hand(self, task: FinalistTask, worker: int) -> None:
        self.context.slots[worker] -= 1
        self._workers[task.key] = worker
        self._live[task.key] = task
        if isinstance(task, SeedTraining):
            self.context.board.add(task.view)
            self.context.tracker.start(task.record)
        task.hand(self.context.engine, worker)

    def _handle(self, event: WorkerEvent) -> list[FinalistTask]:
        """Take an event; a task whose worker died comes back, to be handed out again."""
        if isinstance(event, SlotsEvent):
            self.context.slots[event.worker] = event.free
        elif isinstance(event, LostEvent):
            return self._lost(event)
        elif isinstance(event, ProgressEvent | EvaluatedEvent):
            if task := self._live.get(event.trial):
                task.take(event)
                if isinstance(task, SeedTraining) and isinstance(event, EvaluatedEvent):
                    self.context.tracker.ship(task.record)
        elif isinstance(event, EndedEvent | JudgedEvent) and (
            task := self._live.pop(event.trial, None)
        ):
            cancelled = isinstance(event, EndedEvent) and event.outcome.cause == "cancelled"
            if self._was_set_aside(task) and cancelled:
                return [task]
            task.take(event)
            self._answered(task)
        return []

    def _was_set_aside(self, task: FinalistTask) -> bool:
        """Whether a pause asked it to stop; then its attempt goes on when the pause is over."""
        aside = task.key in self._aside
        self._aside.discard(task.key)
        if aside and isinstance(task, SeedTraining):
            task.view.state = "paused"
        return aside

    def _lost(self, event: LostEvent) -> list[FinalistTask]:
        self.context.slots.pop(event.worker, None)  # its successor announces itself
        task = self._live.pop(event.trial or "", None)
        if task is None:
            return []
        self.context.view.event(f"{task.key}: {event.message.splitlines()[0]}")
        if self._was_set_aside(task):
            return [task]
        if task.attempt < MAX_ATTEMPTS:
            task.attempt += 1
            return [task]
        task.give_up(event.message)
        self._answered(task)
        return []

    def _answered(self, task: FinalistTask) -> None:
        if not isinstance(task, SeedTraining):
            return
        assert task.outcome is not None
        self.budget.ended.append(task.outcome.metrics.get("cost/seconds", 0.0))
        self._record(task)
        left_out = (
            "" if task.outcome.cause in COMPLETE else "; left out of its configuration's mean"
        )
        self.context.view.event(
            task.view.summary(task.outcome, task.settings.objective.metric) + left_out
        )

    def _record(self, training: SeedTraining) -> None:
        outcome = training.outcome
        assert outcome is not None
        training.view.ended(outcome)
        self.context.board.add(training.view)
        status = STATES[outcome.cause].status or "KILLED"
        self.context.tracker.end(training.record, status, outcome.metrics, {"cause": outcome.cause})

    def _cancel(self) -> None:
        """Stop what is trained and wait a moment for it; judgements end with their workers."""
        trainings = [task for task in self._live.values() if isinstance(task, SeedTraining)]
        self._live = {task.key: task for task in trainings}
        for key in self._live:
            self.context.engine.stop(key, "cancelled")
        waited = 0.0
        while self._live and waited < CANCEL_SECONDS:
            event = self.context.engine.next_event(POLL_SECONDS)
            waited += POLL_SECONDS if event is None else 0.0
            if isinstance(event, EndedEvent):
                self._handle(event)
        for training in trainings:
            if training.outcome is None:
                training.outcome = Outcome(cause="cancelled")
                self._record(training)
        self._live.clear()


def _title(arm: ArmPlan) -> str:
    return f"{arm.name} finalists"


def _stored(files: Mapping[HeldOutKind, Path]) -> dict[str, ExampleLosses]:
    return {
        kind: ExampleLosses.model_validate_json(path.read_text(encoding="utf-8"))
        for kind, path in files.items()
        if path.exists()
    }


def _facts(study: optuna.Study) -> ArmBaseline:
    return ArmBaseline.model_validate(study.user_attrs["facts"])
