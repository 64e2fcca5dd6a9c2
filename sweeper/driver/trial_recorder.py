"""Records how trials ended: in the Optuna study, in the tracker, and for the person who watches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial, Trial

from sweeper.core.errors import StudyError
from sweeper.core.outcome import Outcome
from sweeper.driver.arm_context import ArmContext
from sweeper.driver.running_trial import PreparedTrial
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.states import STATES
from sweeper.search.study import ask_again, reattach_orphans, shown_point
from sweeper.search.telling import judged, tell
from sweeper.tracking.tracker import TrialRecord

MAX_SAME_ERRORS = 3
"""Trials of an arm that may end with one and the same code error, after which the study stops. A
judgement: two may be chance, and every further one costs a trial."""


@dataclass
class TrialRecorder:
    """The only writer of outcomes of one arm."""

    context: ArmContext
    on_trial_finished: Callable[[], None]
    """Called after each trial's result is recorded."""
    _errors: Counter[str] = field(default_factory=Counter)

    def record(
        self,
        prepared: PreparedTrial,
        outcome: Outcome,
        seconds: float | None = None,
        *,
        dropped: bool = False,
    ) -> None:
        """Record the outcome of a trial.

        Args:
            prepared: the trial.
            outcome: how it ended, as its worker says.
            seconds: its seconds of work in this run, or None if it did not work.
            dropped: True if a person stopped it for good.

        Raises:
            StudyError: the same code error came MAX_SAME_ERRORS times.
        """
        outcome = judged(outcome, self.context.costs)
        if outcome.cause == "cancelled" and dropped:
            outcome = outcome.model_copy(update={"message": "stopped by hand"})
            # no later trial continues it
            prepared.record.folder.forget_checkpoints()
        elif outcome.cause == "cancelled":
            # Optuna reopens no trial that was told, so a new one gets the point and the checkpoints
            ask_again(self.context.study, prepared.trial, self.context.arm.space)
        # the storage first: after a kill the tracker is brought up to date from it
        self._tell(prepared.trial, outcome)
        if seconds is not None:
            self.context.budget.ended.append(seconds)
        prepared.view.end(outcome)
        services = self.context.services
        # a trial that its worker refused has a run in the tracker all the same
        status = STATES[outcome.cause].status or "KILLED"
        services.tracker.end(prepared.record, status, outcome.metrics, {"cause": outcome.cause})
        services.view.event(prepared.view.summary(outcome, self.context.objective.metric))
        self.on_trial_finished()
        if outcome.cause == "error":
            self._count_error(outcome.message or "")

    def refuse(self, trial: Trial, view: TrialProgress, message: str) -> None:
        """Record a trial that is impossible and was never started."""
        refused = Outcome(cause="refused", message=message)
        self._tell(trial, refused)
        view.end(refused)
        self.context.services.view.event(f"{view.key} refused: {message}")

    def answer_duplicate(self, trial: Trial, earlier: FrozenTrial) -> None:
        """Record a trial at the point of an earlier one, with the earlier one's result."""
        outcome = Outcome.model_validate(earlier.user_attrs["outcome"])
        same = trial.params == earlier.params
        what = "the same point as" if same else "the same modules and settings as"
        message = f"{what} trial {earlier.number}"
        if outcome.best_value is None or STATES[outcome.cause].infeasible:
            answer = Outcome(cause="refused", message=message)
        else:
            answer = outcome.model_copy(update={"cause": "duplicate", "message": message})
            # pruners compare other trials with what this one would have reported
            for step, value in earlier.intermediate_values.items():
                trial.report(value, step)
        self._tell(trial, answer)
        words = f"{self.context.arm.name} {trial.number}: {message}, not trained again"
        self.context.services.view.event(words)

    def recall_finished(self) -> None:
        """Show the trials that earlier runs finished, and track those that they could not."""
        services = self.context.services
        for frozen in self.context.study.get_trials(deepcopy=False):
            if not frozen.state.is_finished() or "outcome" not in frozen.user_attrs:
                continue
            outcome = Outcome.model_validate(frozen.user_attrs["outcome"])
            key, arm = self.context.key(frozen.number), self.context.arm.name
            view = TrialProgress(key=key, arm=arm, number=frozen.number, point=shown_point(frozen))
            view.end(outcome)
            services.board.add(view)
            record = TrialRecord(key, self.context.folder(frozen.number), {}, {"arm": arm})
            services.claims.recall(record)
            if (status := STATES[outcome.cause].status) is not None:
                services.tracker.end(record, status, outcome.metrics, {"cause": outcome.cause})

    def cancel_unprepared(self) -> None:
        """Record trials as cancelled that were asked, but interrupted before they became jobs."""
        for trial in reattach_orphans(self.context.study, self.context.places):
            ask_again(self.context.study, trial, self.context.arm.space)
            self._tell(trial, Outcome(cause="cancelled"))

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        context = self.context
        tell(context.study, trial, outcome, context.base_value, context.costs)

    def _count_error(self, message: str) -> None:
        # the traceback's frames name the place in the code, and its last line the error
        *frames, last = message.splitlines() or [""]
        # without the error's own words, which may name the trial
        place = "\n".join([*frames, last.split(":")[0]])
        self._errors[place] += 1
        if self._errors[place] >= MAX_SAME_ERRORS:
            raise StudyError(
                f"the same error ended {MAX_SAME_ERRORS} trials of arm {self.context.arm.name}. "
                f"The study stops here:\n{message}"
            )
