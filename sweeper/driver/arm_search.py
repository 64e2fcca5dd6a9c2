"""The driver's loop for one arm: ask, hand out, listen, prune, tell.

No batch barrier: the moment a slot is free the next trial is asked. The driver owns the study and the
tracker; workers know neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeper.config.settings import Objective, PrunerSettings, RunSettings, metric_words
from sweeper.config.space import Point
from sweeper.core.errors import CommandRefused, ConfigError, StudyError
from sweeper.core.outcome import ArmBaseline, BaselineRun, Outcome, TrialSize
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import read_spool
from sweeper.driver.budget import ArmBudget, typical_seconds
from sweeper.driver.loop_context import LoopContext
from sweeper.driver.steering import Steering
from sweeper.driver.trial_sizes import KnownSizes, decided, recorded
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.pruning import PruningGuard, as_told, audited, make_watch
from sweeper.search.states import MAX_ATTEMPTS, STATES, counts, feasible, judged, tell
from sweeper.search.study import (
    DROPPED,
    adopt,
    ask,
    ask_again,
    counted,
    shown_point,
    steering_tags,
    suggest,
    twin,
)
from sweeper.search.study_plan import ArmPlan
from sweeper.tracking.provenance import origin
from sweeper.tracking.tracker import TrialRecord, dataset_record
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    EvaluatedEvent,
    LostEvent,
    ProgressEvent,
    SlotsEvent,
    SubmitCommand,
    WaitingEvent,
    WorkerEvent,
)

FRUITLESS = ("refused", "duplicate", "oom", "diverged")
MAX_FRUITLESS = 2
"""Trials of these causes that did not count, per trial wanted: a space of impossible points, or of
trials without room for a single step, must end."""
MAX_SAME_ERRORS = 3
POLL_SECONDS = 1.0
CANCEL_SECONDS = 10.0


@dataclass
class Live:
    """A trial between ask and tell."""

    trial: Trial
    point: Point
    settings: RunSettings
    record: TrialRecord
    view: TrialProgress
    watch: PruningGuard
    attempt: int = 1
    stopping: bool = False
    audited: bool = False
    started: float = 0.0
    """By the budget's clock, moved by the time it was set aside."""
    spent: float = 0.0
    """Seconds of work before it was set aside."""
    worker: int = -1
    dropped: bool = False
    """Stopped for good by a person."""


@dataclass
class ArmDriver:
    """Runs one arm to its n_trials."""

    arm: ArmPlan
    study: optuna.Study
    facts: ArmBaseline
    pruner: PrunerSettings
    budget: ArmBudget
    costs: Sequence[str]
    """Metrics of an outcome that are minimised beside the objective."""
    context: LoopContext
    steering: Steering
    told: Callable[[], None]
    """Called after every trial that was told."""
    adopted: BaselineRun | None = None
    """What stands in for the arm's search: its one trial is judged, not trained."""
    _live: dict[str, Live] = field(default_factory=dict)
    _waiting: list[Live] = field(default_factory=list)
    _aside: set[str] = field(default_factory=set)
    """Running trials that were asked to stop, to be continued after a pause."""
    _checking: dict[int, Live] = field(default_factory=dict)
    """By the worker that was asked whether they are possible."""
    _sizes: KnownSizes = field(default_factory=KnownSizes)
    _errors: Counter[str] = field(default_factory=Counter)
    _refusal: str | None = None
    """Why the budget allows no further trial, once it does not."""

    def run(self) -> None:
        """Until n_trials are used up, the space is exhausted, or the user stops it.

        Raises:
            StudyError: the same code error came MAX_SAME_ERRORS times.
            KeyboardInterrupt: after the running trials were told as cancelled.
        """
        self._recall_finished()
        try:
            for trial in adopt(self.study):
                self._adopt(trial)
            self.steering.read(self)
            while self._more():
                self.context.interrupt.check()
                self._dispatch()
                self.context.board.left = self.budget.left(self._started())
                if event := self.context.engine.next_event(POLL_SECONDS):
                    self._handle(event)
                    self.context.view.update(self.context.board)
                self.steering.read(self)
        except (KeyboardInterrupt, StudyError):
            self._cancel()
            raise
        if (done := counted(self.study)) < self._wanted:
            reason = self._refusal or "what else was asked had been trained before or is impossible"
            self.context.view.event(
                f"arm {self.arm.name} ends at {done} of {self._wanted} trials: {reason}"
            )

    @property
    def objective(self) -> Objective:
        """What the arm's trials are worth."""
        return self.arm.settings.objective

    @property
    def base_value(self) -> float:
        """What the untuned base is worth."""
        return self.facts.base_value(self.objective.metric)

    @property
    def _wanted(self) -> int:
        return self.steering.total(self.arm.name)

    def training(self) -> dict[str, int]:
        """See Steered."""
        checks = {live.record.key: worker for worker, live in self._checking.items()}
        return {**checks, **{key: live.worker for key, live in self._live.items()}}

    def set_aside(self) -> None:
        """See Steered; a check is short: it ends, or begins anew."""
        self._aside.update(live.record.key for live in self._checking.values())
        for key, live in self._live.items():
            self._aside.add(key)
            if not live.stopping:
                self.context.engine.stop(key, "cancelled")

    def drop(self, key: str) -> str:
        """See Steered."""
        waiting = {live.record.key: live for live in self._waiting}
        live = self._live.get(key) or waiting.get(key)
        if live is None:
            known = ", ".join([*self._live, *waiting]) or "none"
            raise CommandRefused(f"{key} is not being trained; these are: {known}")
        live.trial.set_user_attr(DROPPED, True)
        live.dropped = live.stopping = True
        if key in self._live:
            self._aside.discard(key)
            self.context.engine.stop(key, "cancelled")
        else:
            self._waiting.remove(live)
            self._tell(live, Outcome(cause="cancelled"))
        return f"{key} is ended for good"

    def _more(self) -> bool:
        return (
            self.steering.holds
            or bool(self._live or self._waiting or self._checking)
            or self._may_ask()
        )

    def _may_ask(self) -> bool:
        trials = self.study.get_trials(deepcopy=False)
        open_count = len(self._live) + len(self._waiting) + len(self._checking)
        waiting = sum(trial.state is TrialState.WAITING for trial in trials)
        fruitless = sum(map(_fruitless, trials))
        exhausted = self.arm.sampler.name == "grid" and not waiting
        wanted = sum(map(counts, trials)) + open_count < self._wanted
        allowed = wanted and not exhausted and fruitless < MAX_FRUITLESS * self._wanted
        if allowed:
            self._refusal = self.budget.refusal(
                self._started(), typical_seconds(self.budget.ended), self._values(trials)
            )
        return allowed and self._refusal is None

    def _started(self) -> list[float]:
        return [live.started for live in self._live.values()]

    def _values(self, trials: Sequence[FrozenTrial]) -> list[float | None]:
        """What each trial that counts was worth; None for those without a value of their own."""
        return [
            trial.values[0] if trial.state is TrialState.COMPLETE and feasible(trial) else None
            for trial in trials
            if counts(trial)
        ]

    def _dispatch(self) -> None:
        if self.steering.holds:
            return
        for worker in [worker for worker, free in self.context.slots.items() for _ in range(free)]:
            live = self._next()
            if live is None:
                return
            size = self._sizes.size(live.settings)
            if size is None and self.adopted is None:
                self._check(live, worker)
            else:
                self._submit(live, worker, size)

    def _next(self) -> Live | None:
        """The next trial to hand out; those known to be impossible are told at once."""
        while live := self._waiting.pop(0) if self._waiting else self._ask():
            refusal = self._sizes.refusal(live.settings)
            if refusal is None:
                return live
            if refusal.cause == "refused":
                self._tell_refused(live.trial, live.view, refusal.message or "")
            else:
                self._tell(live, refusal)
        return None

    def _check(self, live: Live, worker: int) -> None:
        """Ask whether a trial is possible; the others go on, and its worker's slot comes back."""
        self.context.slots[worker] -= 1
        self._checking[worker] = live
        self.context.engine.probe(worker, CheckCommand(settings=live.settings.trial))

    def _checked(self, event: CheckedEvent) -> None:
        live = self._checking.pop(event.worker, None)
        if live is not None:
            self._aside.discard(live.record.key)
            self._sizes.learn(live.settings, event)
            self._waiting.insert(0, live)

    def _ask(self) -> Live | None:
        """The next trial that needs training; twins and impossible points are answered at once."""
        while self._may_ask():
            trial = ask(self.study)
            point = suggest(trial, self.arm.space)
            if earlier := twin(self.study, point):
                self._answer_twin(
                    trial, earlier.number, Outcome.model_validate(earlier.user_attrs["outcome"])
                )
                continue
            live = self._prepare(trial, point)
            if live is not None:
                return live
        return None

    def _answer_twin(self, trial: Trial, number: int, outcome: Outcome) -> None:
        message = f"the same point as trial {number}"
        if outcome.best_value is None or STATES[outcome.cause].infeasible:
            duplicate = Outcome(cause="refused", message=message)
        else:
            duplicate = outcome.model_copy(update={"cause": "duplicate", "message": message})
        tell(self.study, trial, duplicate, self.base_value, self.costs)
        self.context.view.event(f"{self.arm.name} {trial.number}: {message}; not trained again")

    def _prepare(self, trial: Trial, point: Point, reported: Iterable[int] = ()) -> Live | None:
        key = f"{self.arm.name}/{trial.number:04d}"
        view = TrialProgress(key=key, arm=self.arm.name, number=trial.number, point=point)
        self.context.board.add(view)
        overrides = self.arm.overrides_at(point)
        trial.set_user_attr("point", point)
        trial.set_user_attr("overrides", overrides)
        try:
            settings = self.arm.settings_at(point)
        except ConfigError as error:
            self._tell_refused(trial, view, str(error))
            return None
        folder = self.context.folder.trial(self.arm.name, trial.number)
        if (earlier := trial.user_attrs.get("continues")) is not None:
            folder.continue_from(self.context.folder.trial(self.arm.name, int(earlier)))
        params = recorded(settings.trial, searched=point)
        if self.adopted is not None:
            params = self.adopted.params
        tags = {"arm": self.arm.name, **self._origin(), **steering_tags(trial)}
        dataset = dataset_record(self.facts, settings.data)
        record = TrialRecord(key, folder, params, tags, dataset)
        measured = self._measured(folder)
        watch = make_watch(self.pruner, settings.training, trial, reported, measured)
        return Live(trial, point, settings, record, view, watch)

    def _measured(self, folder: TrialFolder) -> list[tuple[int, float]]:
        """What earlier attempts of a trial measured, as Optuna is told of it, by step."""
        name = self.objective.judged_while_training
        rows = [row for row in read_spool(folder.metrics) if name in row]
        return [(int(row["step"]), as_told(self.objective, float(row[name]))) for row in rows]

    def _tell_refused(self, trial: Trial, view: TrialProgress, message: str) -> None:
        refused = Outcome(cause="refused", message=message)
        tell(self.study, trial, refused, self.base_value, self.costs)
        view.state = "refused"
        self.context.view.event(f"{view.key} refused: {message}")

    def _submit(self, live: Live, worker: int, size: TrialSize | None) -> None:
        """Hand a trial out; what is adopted has no size, because it is not trained."""
        self.context.slots[worker] -= 1
        live.worker = worker
        if size is not None:
            self._take_size(live, size)
        live.trial.set_user_attr("attempt", live.attempt)
        live.view.state = "running"
        live.started = self.budget.clock() - live.spent
        self._live[live.record.key] = live
        self.context.tracker.start(live.record)
        self.context.engine.submit(
            worker,
            SubmitCommand(
                trial=live.record.key,
                attempt=live.attempt,
                folder=live.record.folder.path.resolve(),
                settings=live.settings.trial.with_rank(None if size is None else size.rank),
                provenance={**self._origin(), "attempt": live.attempt},
                adopted=None if self.adopted is None else self.adopted.model,
            ),
        )

    def _take_size(self, live: Live, size: TrialSize) -> None:
        live.record = replace(live.record, params=recorded(live.settings.trial, size, live.point))
        if sized := decided(live.settings, size):
            live.trial.set_user_attr("sized", sized)
            live.view.point = {**live.point, "adapter.r": sized["rank"]}

    def _origin(self) -> dict[str, str]:
        """Code, machine, data and base: where this arm's results come from."""
        adopted = {} if self.adopted is None else {"adopted.run_id": self.adopted.run_id}
        return {**origin(self.context.provenance, self.facts), **adopted}

    def _handle(self, event: WorkerEvent) -> None:
        match event:
            case SlotsEvent():
                self.context.slots[event.worker] = event.free
            case ProgressEvent():
                self._progressed(event)
            case EvaluatedEvent():
                self._evaluated(event)
            case WaitingEvent():
                self.context.view.event(f"{event.trial}: {event.message}")
            case EndedEvent():
                self._ended(event)
            case CheckedEvent():
                self._checked(event)
            case LostEvent():
                self._lost(event)

    def _progressed(self, event: ProgressEvent) -> None:
        live = self._live.get(event.trial)
        if live is not None:
            live.view.progressed(event.step, event.total_steps, event.tokens_per_second)

    def _evaluated(self, event: EvaluatedEvent) -> None:
        live = self._live.get(event.trial)
        if live is None or event.attempt != live.attempt:
            return
        live.view.step, live.view.total_steps = event.step, event.total_steps
        live.view.evaluated(event.value, self.objective)
        self.context.tracker.ship(live.record)
        told = as_told(self.objective, event.value)
        hopeless = live.watch.evaluated(event.step, event.total_steps, told)
        if hopeless and not live.stopping and not live.audited:
            self._stop_or_audit(live, event)

    def _stop_or_audit(self, live: Live, event: EvaluatedEvent) -> None:
        key = live.record.key
        live.audited = audited(self.pruner, self.arm.sampler.seed, key)
        if live.audited:
            live.trial.set_user_attr("audited", True)
            self.context.view.event(f"{key} would be pruned; goes on as an audit of the pruner")
        else:
            live.stopping = True
            self.context.engine.stop(key, "pruned")
            value = f"{metric_words(self.objective.judged_while_training)} {event.value:.4f}"
            self.context.view.event(
                f"{key} is pruned at step {event.step} of {event.total_steps}: {value}, and its best so "
                f"far is behind the others' there (pruner={self.pruner.name})"
            )

    def _ended(self, event: EndedEvent) -> None:
        live = self._live.pop(event.trial, None)
        if live is None:
            return
        if self._was_set_aside(event.trial) and event.outcome.cause == "cancelled":
            self._wait(live)
        else:
            self._tell(live, event.outcome)

    def _was_set_aside(self, key: str) -> bool:
        aside = key in self._aside
        self._aside.discard(key)
        return aside

    def _wait(self, live: Live) -> None:
        """Until the pause is over: the attempt goes on, from its checkpoint."""
        live.spent = self.budget.clock() - live.started if live.started else 0.0
        live.stopping = False
        live.view.state = "paused"
        self._waiting.append(live)

    def _tell(self, live: Live, outcome: Outcome) -> None:
        outcome = judged(outcome, self.costs)
        if outcome.cause == "cancelled" and live.dropped:
            outcome = outcome.model_copy(update={"message": "stopped by hand"})
            live.record.folder.forget_checkpoints()
        elif outcome.cause == "cancelled":
            ask_again(self.study, live.trial, self.arm.space)
        tell(self.study, live.trial, outcome, self.base_value, self.costs)
        if live.started:
            self.budget.ended.append(self.budget.clock() - live.started)
        live.view.ended(outcome)
        # refused by the worker: its run was started all the same
        status = STATES[outcome.cause].status or "KILLED"
        self.context.tracker.end(live.record, status, outcome.metrics, {"cause": outcome.cause})
        self.context.view.event(live.view.summary(outcome, self.objective.metric))
        self.told()
        if outcome.cause == "error":
            self._count_error(outcome.message or "")

    def _count_error(self, message: str) -> None:
        *frames, last = message.splitlines() or [""]
        place = "\n".join([*frames, last.split(":")[0]])  # the words may name the trial
        self._errors[place] += 1
        if self._errors[place] >= MAX_SAME_ERRORS:
            raise StudyError(
                f"the same error ended {MAX_SAME_ERRORS} trials of arm {self.arm.name}; "
                f"the study stops here:\n{message}"
            )

    def _lost(self, event: LostEvent) -> None:
        """A worker died or was killed: its trial gets a new attempt, from its checkpoint, or ends."""
        self.context.slots.pop(event.worker, None)
        live = self._live.pop(event.trial or "", None) or self._checking.pop(event.worker, None)
        if live is None:
            return
        self.context.view.event(f"{live.record.key}: {event.message.splitlines()[0]}")
        if live.dropped:
            self._tell(live, Outcome(cause="cancelled"))
        elif self._was_set_aside(live.record.key):
            self._wait(live)
        elif (
            event.cause == "oom" or live.attempt >= MAX_ATTEMPTS
        ):  # it would run out of memory again
            self._tell(
                live, Outcome(cause=event.cause, message=event.message, steps=live.view.step)
            )
        else:
            live.attempt += 1
            live.stopping = False
            live.view.state = "waiting"
            self._waiting.append(live)

    def _adopt(self, trial: Trial) -> None:
        """A trial that a killed driver left behind: the same point, one attempt more."""
        frozen = next(t for t in self.study.get_trials() if t.number == trial.number)
        reported = frozen.intermediate_values
        live = self._prepare(trial, suggest(trial, self.arm.space), reported)
        if live is None:
            return
        live.audited = bool(frozen.user_attrs.get("audited", False))
        live.dropped = bool(frozen.user_attrs.get(DROPPED, False))
        stored = live.record.folder.outcome
        if stored.exists():  # it ended, but the driver died before it could tell
            self._tell(live, Outcome.model_validate_json(stored.read_text(encoding="utf-8")))
            return
        if live.dropped:
            self._tell(live, Outcome(cause="cancelled"))
            return
        live.attempt = int(frozen.user_attrs.get("attempt", 0)) + 1
        if live.attempt > MAX_ATTEMPTS:
            self._tell(live, Outcome(cause="crash", message="every attempt's driver was killed"))
        else:
            live.view.state = "waiting"
            self._waiting.append(live)

    def _recall_finished(self) -> None:
        """Show what earlier runs finished, and record what they could not."""
        for frozen in self.study.get_trials(deepcopy=False):
            if not frozen.state.is_finished() or "outcome" not in frozen.user_attrs:
                continue
            outcome = Outcome.model_validate(frozen.user_attrs["outcome"])
            key = f"{self.arm.name}/{frozen.number:04d}"
            view = TrialProgress(
                key=key, arm=self.arm.name, number=frozen.number, point=shown_point(frozen)
            )
            view.ended(outcome)
            self.context.board.add(view)
            status = STATES[outcome.cause].status
            if status is not None:
                folder = self.context.folder.trial(self.arm.name, frozen.number)
                record = TrialRecord(key, folder, {}, {"arm": self.arm.name})
                self.context.tracker.end(record, status, outcome.metrics, {"cause": outcome.cause})

    def _cancel(self) -> None:
        """Stop what runs, wait a moment for it, and tell all of it as cancelled."""
        for key in self._live:
            self.context.engine.stop(key, "cancelled")
        waited = 0.0
        while self._live and waited < CANCEL_SECONDS:
            event = self.context.engine.next_event(POLL_SECONDS)
            waited += POLL_SECONDS if event is None else 0.0
            if isinstance(event, EndedEvent):
                self._ended(event)
        for live in [*self._live.values(), *self._checking.values(), *self._waiting]:
            self._tell(live, Outcome(cause="cancelled"))
        self._live.clear()
        self._checking.clear()
        self._waiting.clear()
        for trial in adopt(self.study):  # asked, but not handed out when the interrupt came
            ask_again(self.study, trial, self.arm.space)
            tell(self.study, trial, Outcome(cause="cancelled"), self.base_value, self.costs)


def _fruitless(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get("cause") in FRUITLESS and not counts(trial)
