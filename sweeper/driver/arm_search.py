"""The search of one arm as a source of jobs: which trial is trained next, and when the search ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from optuna.trial import FrozenTrial, Trial, TrialState

from sweeper.config.decisive_settings import accepted_digests
from sweeper.config.settings import RunSettings
from sweeper.config.space import Point
from sweeper.core.errors import ConfigError
from sweeper.core.outcome import Outcome, stored_outcome
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import read_spool
from sweeper.core.trial_identity import TrialIdentity, write_identity
from sweeper.driver.arm_context import ArmContext
from sweeper.driver.budget import NO_DEVICE_HOURS, typical_seconds
from sweeper.driver.folder_claims import contradictions
from sweeper.driver.jobs import MAX_ATTEMPTS, JobPhase
from sweeper.driver.running_trial import PreparedTrial, RunningTrial, WorkTimer
from sweeper.driver.token_goal import EQUAL_TOKENS
from sweeper.driver.trial_recorder import TrialRecorder
from sweeper.driver.trial_sizes import KnownSizes, recorded
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.pruning import as_told, make_watch, report_again
from sweeper.search.record_prefix import ARRIVED, CONTINUES, TrialTurn, next_turn, read_by, turn_of
from sweeper.search.states import STATES
from sweeper.search.study import (
    AUDITED,
    DROPPED,
    HOPELESS_AT,
    ask,
    decided_rank,
    find_duplicate,
    next_queued,
    reattach_orphans,
    steering_tags,
    suggest,
)
from sweeper.search.telling import counts, feasible
from sweeper.tracking.tracker import TrialRecord, dataset_record

MAX_FRUITLESS = 2
"""Fruitless trials per trial wanted: a search ends that finds only impossible points and duplicates.
A judgement: so many without a result show that the space is used up."""


class ArmSearch:
    """Asks the arm's study for trials until n_trials are used up or no further one may be started."""

    def __init__(
        self,
        context: ArmContext,
        wanted: Callable[[Sequence[FrozenTrial]], int],
        on_trial_finished: Callable[[], None],
    ) -> None:
        """
        Args:
            context: the arm.
            wanted: returns how many of the arm's trials are to run, given those that it has. Commands
                may raise the number while it runs.
            on_trial_finished: called after each trial's result is recorded.
        """
        self._context = context
        self._wanted = wanted
        self._recorder = TrialRecorder(context, on_trial_finished)
        self._sizes = KnownSizes()
        self._open: dict[str, RunningTrial] = {}
        self._resumed: deque[RunningTrial] = deque()
        """Open trials of an earlier run that no worker has got yet."""
        self._refusal: str | None = None
        """The budget's reason to start no further trial."""
        self._passed_on = False
        """True if the next arm got device time with which this one could have begun a further trial."""

    def begin(self) -> None:
        """Show the trials that earlier runs finished, and take over those that they left open."""
        self._recorder.recall_finished()
        self._resumed.extend(self._orphans())

    def conclude(self) -> None:
        """Say why the search has ended before its total, if it has."""
        done, wanted = self._counted()
        if done < wanted:
            reason = self._refusal or "every other proposed point was a duplicate or infeasible"
            self._context.services.view.event(
                f"arm {self._context.arm.name} ends at {done} of {wanted} trials: {reason}"
            )

    @property
    def done(self) -> bool:
        """See JobSource. A search that waits for an open trial to decide about the next is not done."""
        return not self._resumed and self._next_step() == "end"

    @property
    def budget_left(self) -> str:
        """See JobSource."""
        return self._context.budget.left(self._started())

    def next_job(self) -> RunningTrial | None:
        """See JobSource: duplicates and impossible points are answered at once."""
        if self._resumed:
            return self._resumed.popleft()
        equal = self._context.facts.equal_presets
        while self._next_step() == "ask":
            trial = ask(self._context.study, self._context.places)
            point = suggest(trial, self._context.arm.space)
            # training the same point again would cost a trial and teach the sampler nothing
            if earlier := find_duplicate(trial.study, point, equal):
                self._recorder.answer_duplicate(trial, earlier)
                continue
            job = self._prepare(trial, point)
            if job is None:
                continue
            refusal = self._sizes.refusal(job.prepared.settings)
            if refusal is None:
                return job
            job.outcome = refusal
            self.finished(job)
        return None

    def withdraw(self, key: str) -> RunningTrial | None:
        """See JobSource."""
        for job in self._resumed:
            if job.key == key:
                self._resumed.remove(job)
                return job
        return None

    def settle(self) -> None:
        """See JobSource: a search has one part."""

    def finished(self, job: RunningTrial) -> None:
        """See JobSource."""
        self._open.pop(job.key, None)
        outcome = job.outcome
        assert outcome is not None, f"{job.key} ended without an outcome"
        # a trial that never started has no run in the tracker
        if outcome.cause == "refused" and not job.timer.started:
            prepared = job.prepared
            self._recorder.refuse(prepared.trial, prepared.view, outcome.message or "")
            return
        seconds = job.timer.seconds if job.timer.started else None
        dropped = job.phase is JobPhase.DROPPING
        self._recorder.record(job.prepared, outcome, seconds, dropped=dropped)

    def abandon(self) -> None:
        """See JobSource."""
        while self._resumed:
            job = self._resumed.popleft()
            job.cancel()
            self.finished(job)
        self._recorder.cancel_unprepared()

    def pass_budget_on(self) -> float:
        """Keep the device time that the open trials are expected to take, and return it in seconds."""
        budget, started = self._context.budget, self._started()
        self._passed_on = self._passed_on or self._refusal is None
        checked = [budget.clock()] * (len(self._open) - len(started))  # they start in a moment
        return budget.pass_on([*started, *checked], typical_seconds(budget.ended))

    @property
    def gave_way(self) -> bool:
        """True if trials are lacking only because the next arm has got the device time for them."""
        done, wanted = self._counted()
        return done < wanted and self._passed_on and self._refusal == NO_DEVICE_HOURS

    def _counted(self) -> tuple[int, int]:
        """Return how many trials have used up the arm's number, and the number."""
        trials = self._context.study.get_trials(deepcopy=False)
        return sum(map(counts, trials)), self._wanted(trials)

    def _next_step(self) -> Literal["ask", "wait", "end"]:
        """Return how the search uses a free slot: ask for a trial, wait for an open one, or end."""
        trials = self._context.study.get_trials(deepcopy=False)
        waiting = sum(trial.state is TrialState.WAITING for trial in trials)
        # the whole grid was queued when the arm was opened; a grid sampler would repeat its points
        exhausted = self._context.arm.sampler.name == "grid" and not waiting
        goal, total = self._context.goal, self._wanted(trials)
        most = total if goal is None else goal.most_trials(total)
        if exhausted or sum(map(counts, trials)) + len(self._open) >= most:
            return "end"
        turn = next_turn(trials, self._context.places)
        if self._awaits(turn, trials):
            return "wait"
        read = read_by(turn, trials)
        if sum(map(_fruitless, read)) >= MAX_FRUITLESS * total:
            return "end"
        if goal is not None and goal.reached(read, turn):
            self._refusal = EQUAL_TOKENS
            return "end"
        budget = self._context.budget
        self._refusal = budget.refusal(
            # the plateau reads the record that the sampler reads,
            # so it does not depend on what runs
            self._started(),
            typical_seconds(budget.ended),
            _values(read),
        )
        return "ask" if self._refusal is None else "end"

    def _awaits(self, turn: TrialTurn, trials: Sequence[FrozenTrial]) -> bool:
        """Return True if a trial is open whose end the decision about the next one reads."""
        queued = next_queued(trials)
        continues = queued is not None and CONTINUES in queued.user_attrs
        # an interrupted trial's turn comes before the next one
        if continues or self._context.places == ARRIVED:
            return False
        return any(turn_of(job.prepared.trial).place < turn.reads for job in self._open.values())

    def _started(self) -> list[float]:
        """Return when each open trial would have been started if it had never waited."""
        now, timers = self._context.budget.clock(), [job.timer for job in self._open.values()]
        return [now - timer.seconds for timer in timers if timer.started]

    def _prepare(
        self, trial: Trial, point: Point, reported: Iterable[int] = ()
    ) -> RunningTrial | None:
        """Make a job of a trial, or refuse a trial whose point is no valid configuration."""
        context = self._context
        key, number = context.key(trial.number), trial.number
        view = TrialProgress(key=key, arm=context.arm.name, number=number, point=point)
        context.services.board.add(view)
        # stored at once, so that a killed driver's successor and reports find them
        trial.set_user_attr("point", point)
        trial.set_user_attr("overrides", context.arm.overrides_at(point))
        try:
            settings = context.arm.settings_at(point)
        except ConfigError as error:
            self._recorder.refuse(trial, view, str(error))
            return None
        folder = context.folder(number)
        params = recorded(settings.trial, searched=point)
        if context.adopted is not None:
            params = context.adopted.params
        tags = {"arm": context.arm.name, **context.origin, **steering_tags(trial)}
        record = TrialRecord(
            key, folder, params, tags, dataset_record(context.facts, settings.data)
        )
        identity = self._claim(record, settings, trial)
        measured = self._measured(folder)
        if measured and CONTINUES in trial.user_attrs:
            earlier = context.study.get_trials(deepcopy=False)[trial.user_attrs[CONTINUES]]
            reported = report_again(trial, earlier, reported)
        guard = make_watch(context.pruner, settings.training, trial, reported, measured)
        prepared = PreparedTrial(trial, point, settings, record, identity, view, guard)
        job = RunningTrial(context, prepared, self._sizes, WorkTimer(context.budget.clock))
        # an interrupted trial keeps what was decided about it: an
        # audit stays one, a stop stays a stop
        job.audited = bool(trial.user_attrs.get(AUDITED, False))
        job.hopeless_at = trial.user_attrs.get(HOPELESS_AT)
        self._open[key] = job
        return job

    def _claim(self, record: TrialRecord, settings: RunSettings, trial: Trial) -> TrialIdentity:
        """Make the trial's folder its own, with the checkpoints of the trial that it continues."""
        context, claims = self._context, self._context.services.claims
        ranked = settings.trial.with_rank(decided_rank(trial))
        inputs = context.inputs(settings.trial)
        identity = claims.claim(record, settings.trial, inputs, also=[ranked])
        # a cancelled trial is final for Optuna, so its checkpoints are continued by a new trial
        if (number := trial.user_attrs.get(CONTINUES)) is not None:
            earlier = context.folder(int(number))
            whatever_number = identity.model_copy(update={"trial": None})
            reasons = contradictions(
                earlier, whatever_number, accepted_digests(settings.trial, ranked)
            )
            if not reasons:
                write_identity(record.folder, identity)  # first: a kill must not leave it unnamed
                record.folder.continue_from(earlier)
            elif not record.folder.checkpoints.exists():
                context.services.view.event(
                    f"{record.key}: starts from its first step. {earlier.path}, which it continues, "
                    f"holds the work of another trial ({', '.join(reasons)})"
                )
        return identity

    def _measured(self, folder: TrialFolder) -> list[tuple[int, float]]:
        """Return the (step, value) pairs that earlier attempts measured, in Optuna's sign."""
        objective = self._context.objective
        name = objective.judged_while_training
        rows = [row for row in read_spool(folder.metrics) if name in row]
        return [(int(row["step"]), as_told(objective, float(row[name]))) for row in rows]

    def _orphans(self) -> list[RunningTrial]:
        """Return the trials that a killed driver left behind, with one attempt more."""
        found = [
            self._orphan(trial)
            for trial in reattach_orphans(self._context.study, self._context.places)
        ]
        return [job for job in found if job is not None]

    def _orphan(self, trial: Trial) -> RunningTrial | None:
        """Make a job of an orphan, or record an orphan that has a result already."""
        study = self._context.study
        frozen = next(each for each in study.get_trials() if each.number == trial.number)
        point = suggest(trial, self._context.arm.space)
        job = self._prepare(trial, point, frozen.intermediate_values)
        if job is None:
            return None
        job.attempt = int(frozen.user_attrs.get("attempt", 0)) + 1
        dropped = DROPPED in frozen.user_attrs
        # it may have ended, and the driver died before it could tell
        stored = stored_outcome(job.prepared.record.folder)
        if stored is not None:
            outcome = stored
        elif dropped:
            outcome = Outcome(cause="cancelled")
        elif job.attempt > MAX_ATTEMPTS:
            outcome = Outcome(cause="crash", message="every attempt's driver was killed")
        else:
            return job
        del self._open[job.key]
        self._recorder.record(job.prepared, outcome, dropped=dropped)
        return None


def _values(trials: Sequence[FrozenTrial]) -> list[float | None]:
    """Return the value of each trial that uses budget, or None where it has none of its own."""
    return [
        trial.values[0] if trial.state is TrialState.COMPLETE and feasible(trial) else None
        for trial in trials
        if counts(trial)
    ]


def _fruitless(trial: FrozenTrial) -> bool:
    """Return True if a trial told the sampler something, but used no budget."""
    cause = trial.user_attrs.get("cause")
    return cause in STATES and STATES[cause].state == "COMPLETE" and not counts(trial)
