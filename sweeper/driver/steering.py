"""Steering a study while it runs: the driver's side.

The loops call `read` once a turn. It obeys what lies in the inbox, holds a pause or a stop, and writes
down where the study stands. Every command has its effect once, however often the driver is killed: an
effect is stored together with the command's id, or is harmless to repeat, before the command is
answered and removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import optuna
from pydantic import Field, ValidationError

from sweeper.config.space import Draw, Scalar, grid
from sweeper.core.errors import CommandRefused, StudyError
from sweeper.core.paths import StudyFolder, write_json
from sweeper.core.signals import StopSignal
from sweeper.core.value import FrozenValue
from sweeper.driver.arm_status import arm_standing
from sweeper.driver.budget import StudyBudget
from sweeper.driver.command_files import (
    TO_A_DRIVER,
    CloneTrial,
    CommandAnswer,
    CommandFile,
    CommandInbox,
    EnqueuePoint,
    ExtendArm,
    PauseStudy,
    ResumeStudy,
    StopStudy,
    StopTrial,
    StudyCommand,
)
from sweeper.driver.loop_context import LoopContext
from sweeper.reporting.study_progress import StudyProgress, StudyView, short_names
from sweeper.reporting.study_status import (
    StudyState,
    StudyStatus,
    process_of_driver,
    trial_standing,
)
from sweeper.search.requested_point import earlier_point, queue, read_draw
from sweeper.search.study import CLONE_OF, counted, enqueue, first_draws
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.tracking.tracker import RunStatus

FREE_SECONDS = 20.0
"""How long a paused trial may take to its checkpoint; then its worker is killed, and it goes on from
the checkpoint before. Leaves ten of the promised 30 s for the rest."""
STANDING_SECONDS = 2.0
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
ENDS: dict[RunStatus, StudyState] = {
    "FINISHED": "finished",
    "KILLED": "stopped",
    "FAILED": "failed",
}


class Steered(Protocol):
    """What a loop lets a person do with it."""

    context: LoopContext

    def training(self) -> Mapping[str, int]:
        """What workers are busy with, by its key: the worker's number."""

    def set_aside(self) -> None:
        """Ask all that is being trained to stop with a checkpoint, to be continued later."""

    def drop(self, key: str) -> str:
        """End one trial for good; says what happens.

        Raises:
            Refused: it is not open.
        """


class ObeyedCommand(FrozenValue):
    """One command, and what became of it."""

    at: str
    command: StudyCommand
    answer: CommandAnswer


class SteeringRecord(FrozenValue):
    """steering.json: every command by its id, and the totals that commands have raised, by arm."""

    totals: dict[str, int] = Field(default_factory=dict)
    commands: dict[str, ObeyedCommand] = Field(default_factory=dict)


class CommandDeferred(Exception):
    """A command cannot be obeyed yet: it stays in the inbox."""


@dataclass
class Steering:
    """What people asked of a study. `plan` is the study's, with the totals that commands have raised."""

    plan: StudyPlan
    folder: StudyFolder
    interrupt: StopSignal
    budget: StudyBudget
    board: StudyProgress
    studies: dict[str, optuna.Study]
    """By arm; those not opened yet are missing."""
    clock: Callable[[], float] = time.monotonic
    searched: bool = False
    """Whether every search has ended and its finalists are under way."""
    _state: StudyState = "starting"
    _paused_at: float = 0.0
    _patient_until: float = 0.0
    _told_at: float = -STANDING_SECONDS
    _counted_until: float = 0.0
    """Until when the pause was taken out of the budget."""
    _freed: bool = False
    _later: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._since = time.strftime(TIME_FORMAT)
        self._inbox = CommandInbox(self.folder)
        self._record = _read_record(self.folder)
        self._raise_totals()

    @property
    def holds(self) -> bool:
        """Whether nothing new may be started now."""
        return self._state in ("paused", "stopping")

    def total(self, arm: str) -> int:
        """An arm's n_trials as it is now."""
        return self.arm(arm).n_trials

    def arm(self, name: str | None) -> ArmPlan:
        """An arm by its name, the first one without.

        Raises:
            Refused: there is none of this name.
        """
        arms = {arm.name: arm for arm in self.plan.arms}
        if name is None:
            return self.plan.arms[0]
        if name not in arms:
            raise CommandRefused(f"--arm {name}: no such arm; choose {', '.join(arms)}")
        return arms[name]

    def catch_up(self, view: StudyView) -> None:
        """Before the first arm is opened: what was kept since the last run.

        What was meant for an earlier driver is refused; totals are raised, since they decide
        whether there is anything to do; the rest waits for its arm.
        """
        self._inbox.forget_answers()
        for letter in self._letters(view):
            if isinstance(letter.command, TO_A_DRIVER):
                words = "it was meant for an earlier run of this study, which has ended"
                self._reply(letter, CommandAnswer(ok=False, text=words), view)
            elif isinstance(letter.command, ExtendArm):
                self._obey(letter, None, view)
        self._tell()

    def read(self, steered: Steered) -> None:
        """Obey what has arrived; hold a pause or a stop; write down where the study stands."""
        if self._state == "starting":
            self._enter("running")
        for letter in self._letters(steered.context.view):
            self._obey(letter, steered, steered.context.view)
        if self._state == "paused":
            self._hold(steered)
        if self._state == "stopping" and not steered.training():
            self.interrupt.request()
        if self.clock() - self._told_at >= STANDING_SECONDS:
            self._tell()

    def open_arm(self, arm: str, study: optuna.Study) -> None:
        """From now on this is the arm's study; commands that waited for it are looked at again."""
        self.studies[arm] = study
        self._later.clear()

    def close(self, status: RunStatus) -> None:
        """The study ends, in whichever way."""
        self._enter(ENDS[status])

    def _letters(self, view: StudyView) -> list[CommandFile]:
        letters = []
        for found in self._inbox.letters():
            if isinstance(found, str):
                view.event(found)
            elif found.id in self._record.commands:  # killed before it could answer
                self._inbox.answer(found, self._record.commands[found.id].answer)
            elif found.id not in self._later:
                letters.append(found)
        return letters

    def _obey(self, letter: CommandFile, steered: Steered | None, view: StudyView) -> None:
        try:
            answer = CommandAnswer(ok=True, text=self._done(letter, letter.command, steered))
        except CommandRefused as refusal:
            answer = CommandAnswer(ok=False, text=str(refusal))
        except CommandDeferred as reason:
            self._later.add(letter.id)
            view.event(f"{_said(letter.command)}: {reason}")
            return
        self._reply(letter, answer, view)

    def _reply(self, letter: CommandFile, answer: CommandAnswer, view: StudyView) -> None:
        now = time.strftime(TIME_FORMAT)
        self._record.commands[letter.id] = ObeyedCommand(
            at=now, command=letter.command, answer=answer
        )
        write_json(self.folder.steering, self._record.model_dump(mode="json"))
        result = answer.text if answer.ok else f"refused: {answer.text}"
        view.event(f"{_said(letter.command)}: {result}")
        self._tell()  # before the answer: who reads it may look at once
        self._inbox.answer(letter, answer)

    def _done(self, letter: CommandFile, command: StudyCommand, steered: Steered | None) -> str:
        """Obey one command; says what happens."""
        match command:
            case ExtendArm():
                return self._extend(letter.id, command)
            case EnqueuePoint():
                draw = self._draw(command)
                return self._queue(letter.id, self.arm(command.arm), draw, {})
            case CloneTrial():
                draw, clone_of = self._draw(command), {CLONE_OF: command.trial}
                return self._queue(letter.id, self.arm(command.arm), draw, clone_of)
        assert steered is not None, "these are refused before a loop runs"
        match command:
            case PauseStudy():
                return self._pause(steered)
            case ResumeStudy():
                return self._resume()
            case StopStudy():
                return self._stop(command, steered)
            case StopTrial():
                return steered.drop(f"{self.arm(command.arm).name}/{command.trial:04d}")

    def _pause(self, steered: Steered) -> str:
        if self._state == "paused":
            return "it is paused already"
        self._refuse_while_stopping("pause")
        self._enter("paused")
        self._paused_at = self._counted_until = self.clock()
        self._patient_until = self._paused_at + FREE_SECONDS
        self._freed = False
        steered.set_aside()
        if not (count := len(steered.training())):
            return "paused; nothing is being trained"
        return f"paused; {_trials(count)} being trained: each stops with a checkpoint"

    def _resume(self) -> str:
        before = self._state
        if not self.holds:
            return "it is running already"
        if before == "paused":
            self._count_pause()
        self._enter("running")
        return "it goes on" if before == "paused" else "the stop is taken back; it goes on"

    def _stop(self, command: StopStudy, steered: Steered) -> str:
        count = len(steered.training())
        if command.now:
            self.interrupt.request()
        self._enter("stopping")
        if command.now:
            return f"it ends now; {_trials(count)} being trained: each stops with a checkpoint"
        if count:
            return f"it ends after the {_trials(count)} being trained; none is started"
        return "it ends now; nothing is being trained"

    def _refuse_while_stopping(self, verb: str) -> None:
        if self._state == "stopping":
            raise CommandRefused(f"it is stopping; `study resume` takes that back, then {verb} it")

    def _extend(self, identity: str, command: ExtendArm) -> str:
        arm = self._searching(command.arm)
        total = arm.n_trials + command.trials
        if arm.sampler.name == "grid":
            size = sum(1 for _ in grid(arm.space))
            if size <= arm.n_trials:
                raise CommandRefused(f"arm {arm.name} walks all {size} points of its grid already")
            total = min(total, size)
        self._record.totals[arm.name] = total  # stored by the reply, together with the id
        self._raise_totals()
        if arm.sampler.name == "grid" and arm.name in self.studies:
            enqueue(self.studies[arm.name], first_draws(self.arm(arm.name)))
        if self.board.arm == arm.name:
            self.board.wanted = total
        return f"arm {arm.name} now wants {total} trials instead of {arm.n_trials}"

    def _draw(self, command: EnqueuePoint | CloneTrial) -> Draw:
        arm = self._searching(command.arm)
        if isinstance(command, EnqueuePoint):
            return read_draw(arm, command.values)
        if not command.values:
            raise CommandRefused("give at least one KEY=VALUE that differs from the trial's")
        study = self._study_of(arm)
        return read_draw(arm, command.values, earlier_point(study, arm, command.trial))

    def _queue(
        self, identity: str, arm: ArmPlan, draw: Draw, attributes: Mapping[str, Scalar]
    ) -> str:
        study = self._study_of(arm)
        queue(study, draw, identity, attributes)
        named = ", ".join(f"{key}={value}" for key, value in short_names(draw).items())
        room = arm.n_trials - counted(study)
        full = "" if room > 0 else f"; but all {arm.n_trials} trials are used up: extend it"
        return f"arm {arm.name} tries {named} next{full}"

    def _study_of(self, arm: ArmPlan) -> optuna.Study:
        if arm.name not in self.studies:
            raise CommandDeferred(f"kept until arm {arm.name} begins")
        return self.studies[arm.name]

    def _searching(self, name: str | None) -> ArmPlan:
        """An arm whose search takes further points."""
        arm = self.arm(name)
        if arm.run_id is not None:
            raise CommandRefused(
                f"arm {arm.name} is an earlier run (baseline.run_id): it has no search"
            )
        if self.searched:
            raise CommandRefused(
                "every search of this study has ended, and its finalists are under way; send it again "
                "when the study has ended: it is then kept for the next start"
            )
        return arm

    def _hold(self, steered: Steered) -> None:
        """A pause: once nothing is trained, end the workers, since they keep the base loaded."""
        self._count_pause()
        busy = steered.training()
        if not busy and not self._freed:
            for worker in list(steered.context.slots):
                steered.context.engine.kill(worker, "paused")
            self._freed = True
            took = self.clock() - self._paused_at
            steered.context.view.event(
                f"paused after {took:.0f} s: no worker holds memory of a device"
            )
        elif busy and self.clock() > self._patient_until:
            for key, worker in busy.items():
                steered.context.view.event(f"{key}: no checkpoint within {FREE_SECONDS:.0f} s")
                steered.context.engine.kill(worker, "paused, and took too long to its checkpoint")
            self._patient_until += FREE_SECONDS  # their loss is told soon

    def _count_pause(self) -> None:
        now = self.clock()
        self.budget.paused(now - self._counted_until)
        self._counted_until = now

    def _raise_totals(self) -> None:
        totals = self._record.totals
        arms = tuple(
            replace(arm, n_trials=max(arm.n_trials, totals.get(arm.name, 0)))
            for arm in self.plan.arms
        )
        study = self.plan.study.model_copy(update={"n_trials": arms[0].n_trials})
        self.plan = replace(self.plan, arms=arms, study=study)

    def _enter(self, state: StudyState) -> None:
        self._state = state
        self.board.note = state if self.holds else ""
        self._tell()

    def _tell(self) -> None:
        """Write down where the study stands."""
        self._told_at = self.clock()
        process, host = process_of_driver()
        open_states = ("running", "waiting", "paused")
        standing = StudyStatus(
            study_name=self.plan.study.study_name,
            state=self._state,
            command=self.plan.command,
            since=self._since,
            process=process,
            host=host,
            objective=self.plan.objective,
            left=self.board.left,
            arms=tuple(arm_standing(arm, self.studies.get(arm.name)) for arm in self.plan.arms),
            running=tuple(
                trial_standing(trial)
                for trial in self.board.trials.values()
                if trial.state in open_states
            ),
        )
        with suppress(OSError):  # a full disk ends no study for a look at it
            write_json(self.folder.standing, standing.model_dump(mode="json"))


def _read_record(folder: StudyFolder) -> SteeringRecord:
    if not folder.steering.exists():
        return SteeringRecord()
    try:
        return SteeringRecord.model_validate_json(folder.steering.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise StudyError(
            f"{folder.steering} cannot be read ({problem}); move it away to go on: what `study "
            "extend` has added is then forgotten, and can be added again"
        ) from None


def _said(command: StudyCommand) -> str:
    """A command in the words of the command line."""
    match command:
        case StopTrial():
            return f"study stop --trial {command.trial}"
        case StopStudy(now=True):
            return "study stop --now"
        case ExtendArm():
            return f"study extend --trials {command.trials}"
        case CloneTrial():
            return f"study clone {command.trial}"
        case _:
            return f"study {command.verb}"


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"{count} trials"
