"""Obeys the commands that people send to a study while it runs.

Every command has its effect once, however often the driver is killed: an effect is stored together with
the command's id, or is harmless to repeat, before the command is answered and removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import optuna

from sweeper.config.space import Draw, Scalar, grid
from sweeper.core.errors import CommandRefused
from sweeper.driver.command_files import (
    TO_A_DRIVER,
    TO_A_SEARCH,
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
from sweeper.driver.command_log import CommandLog
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.jobs import Job
from sweeper.driver.status_writer import StatusWriter
from sweeper.driver.study_state import StudyState
from sweeper.reporting.study_progress import short_names
from sweeper.search.requested_point import earlier_point, queue, read_draw
from sweeper.search.study import CLONE_OF, counted, enqueue, first_draws
from sweeper.search.study_plan import ArmPlan

SEARCHES_ENDED = (
    "every search of this study has ended, and its finalists are running. Send the command again when "
    "the study has ended: it is then kept for the next start"
)


TURN_SECONDS = 0.25
"""Seconds of one turn of the driver's loop that may go to commands."""


class NotYetPossible(Exception):
    """A command must wait in the inbox."""


@dataclass
class CommandHandler:
    """Reads the inbox of a study and obeys what lies in it."""

    state: StudyState
    inbox: CommandInbox
    log: CommandLog
    status: StatusWriter
    announce: Callable[[str], None]
    _waiting: set[str] = field(default_factory=set)
    """Commands that wait until their arm begins."""
    _answers: dict[str, tuple[CommandFile, CommandAnswer]] = field(default_factory=dict)
    """Commands that were obeyed, with answers that are not sent yet, by id."""
    _told: bool = False
    """True after a message that answers cannot be stored."""

    def catch_up(self) -> None:
        """Obey the commands that were kept since the last run, before the first arm is opened.

        Commands to an earlier driver are refused. Totals are raised, because they decide whether there
        is anything to do. All other commands wait for their arm.
        """
        self.inbox.forget_answers()
        for letter in self._letters():
            if isinstance(letter.command, TO_A_DRIVER):
                words = "it was meant for an earlier run of this study, which has ended"
                self._reply(letter, CommandAnswer(ok=False, text=words))
            elif isinstance(letter.command, ExtendArm):
                self._obey(letter, None)
        self._send_answers()
        self.status.write()

    def obey(self, dispatcher: Dispatcher) -> None:
        """Obey what has arrived, as far as one turn of the loop has time for it."""
        self._obey_in_turn(self._letters(), dispatcher)

    def on_arm_opened(self) -> None:
        """Obey the commands that waited for an arm, before its first trial is asked."""
        self._waiting.clear()
        kept = (each for each in self._letters() if isinstance(each.command, TO_A_SEARCH))
        self._obey_in_turn(kept, None)

    def _obey_in_turn(self, letters: Iterator[CommandFile], dispatcher: Dispatcher | None) -> None:
        end = time.monotonic() + TURN_SECONDS
        for letter in letters:
            self._obey(letter, dispatcher)
            if time.monotonic() > end:
                break
        self._send_answers()

    def _letters(self) -> Iterator[CommandFile]:
        """Yield the commands that were neither obeyed nor put off."""
        for found in self.inbox.letters(besides={*self._waiting, *self._answers}):
            if isinstance(found, str):
                self.announce(found)
            elif (answer := self.log.answer_to(found.id)) is not None:
                self._answers[found.id] = found, answer  # killed before it could answer
            else:
                yield found

    def _obey(self, letter: CommandFile, dispatcher: Dispatcher | None) -> None:
        command = letter.command
        try:
            if isinstance(command, TO_A_SEARCH):
                text = self._change_search(letter.id, command)
            else:
                assert dispatcher is not None, "commands to a driver need one"
                text = self._steer(command, dispatcher)
            answer = CommandAnswer(ok=True, text=text)
        except CommandRefused as refusal:
            answer = CommandAnswer(ok=False, text=str(refusal))
        except NotYetPossible as reason:
            self._waiting.add(letter.id)
            self.announce(f"{command_line(command)}: {reason}")
            return
        if dispatcher is not None:
            self.status.enter(dispatcher.mode)
        self._reply(letter, answer)

    def _reply(self, letter: CommandFile, answer: CommandAnswer) -> None:
        self.log.note(letter, answer)
        result = answer.text if answer.ok else f"refused: {answer.text}"
        self.announce(f"{command_line(letter.command)}: {result}")
        self._answers[letter.id] = letter, answer

    def _send_answers(self) -> None:
        """Store what was obeyed in this turn, then answer. On a full disk the next turn tries again."""
        if not self._answers:
            return
        try:
            self.log.store()
            self.status.write()  # before the answers: their readers may look at the status at once
            for letter, answer in list(self._answers.values()):
                self.inbox.answer(letter, answer)
                del self._answers[letter.id]
        except OSError as error:
            if not self._told:
                self.announce(f"commands are obeyed, and answered later: {error}")
            self._told = True
        else:
            self._told = False

    def _steer(
        self, command: PauseStudy | ResumeStudy | StopStudy | StopTrial, dispatcher: Dispatcher
    ) -> str:
        """Obey a command to the driver and return the answer."""
        if dispatcher.ends_now and isinstance(command, PauseStudy | ResumeStudy):
            raise CommandRefused("the study stops at once. The same command continues it later")
        match command:
            case PauseStudy():
                return _pause(dispatcher)
            case ResumeStudy():
                return _resume(dispatcher)
            case StopStudy():
                return _stop(command, dispatcher)
            case StopTrial():
                if self.state.searches_ended:
                    raise CommandRefused(
                        "every search of this study has ended. Its finalists run to their end"
                    )
                key = f"{self.state.arm(command.arm).name}/{command.trial:04d}"
                dispatcher.drop(key)
                return f"{key} stopped for good"

    def _change_search(self, identity: str, command: ExtendArm | EnqueuePoint | CloneTrial) -> str:
        """Obey a command to an arm's search and return the answer."""
        arm = self._searching(command.arm)
        match command:
            case ExtendArm():
                return self._extend(arm, command)
            case EnqueuePoint():
                return self._queue(identity, arm, read_draw(arm, command.values), {})
            case CloneTrial():
                if not command.values:
                    raise CommandRefused(
                        "give at least one KEY=VALUE that differs from the trial's"
                    )
                before = earlier_point(self._study_of(arm), arm, command.trial)
                draw = read_draw(arm, command.values, before)
                return self._queue(identity, arm, draw, {CLONE_OF: command.trial})

    def _extend(self, arm: ArmPlan, command: ExtendArm) -> str:
        total = arm.n_trials + command.trials
        if arm.sampler.name == "grid":
            size = sum(1 for _ in grid(arm.space))
            if size <= arm.n_trials:
                raise CommandRefused(f"arm {arm.name} already tries all {size} points of its grid")
            total = min(total, size)
        self.log.totals[arm.name] = total  # stored with the answer, together with the command's id
        self.state.raise_totals(self.log.totals)
        if arm.sampler.name == "grid" and arm.name in self.state.studies:
            enqueue(self.state.studies[arm.name], first_draws(self.state.arm(arm.name)))
        return f"arm {arm.name} extended from {arm.n_trials} to {total} trials"

    def _queue(
        self, identity: str, arm: ArmPlan, draw: Draw, attributes: Mapping[str, Scalar]
    ) -> str:
        study = self._study_of(arm)
        queue(study, draw, identity, attributes)
        named = ", ".join(f"{key}={value}" for key, value in short_names(draw).items())
        room = arm.n_trials - counted(study)
        full = "" if room > 0 else f", but all {arm.n_trials} trials are used up: extend the study"
        return f"next trial of arm {arm.name}: {named}{full}"

    def _study_of(self, arm: ArmPlan) -> optuna.Study:
        if arm.name not in self.state.studies:
            raise NotYetPossible(f"kept until arm {arm.name} begins")
        return self.state.studies[arm.name]

    def _searching(self, name: str | None) -> ArmPlan:
        """Return an arm whose search takes further points."""
        arm = self.state.arm(name)
        if arm.run_id is not None:
            raise CommandRefused(
                f"arm {arm.name} is an earlier run (baseline.run_id): it has no search"
            )
        if self.state.searches_ended:
            raise CommandRefused(SEARCHES_ENDED)
        return arm


def command_line(command: StudyCommand) -> str:
    """Return a command as a person types it."""
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


def _pause(dispatcher: Dispatcher) -> str:
    if dispatcher.mode == "paused":
        return "already paused"
    if dispatcher.mode == "stopping":
        raise CommandRefused(
            "the study is stopping. Cancel the stop with `study resume`, then pause it"
        )
    dispatcher.pause()
    if busy := dispatcher.busy:
        return f"pausing: waiting for {_count(busy)} to stop"
    return "paused. No trial is running"


def _resume(dispatcher: Dispatcher) -> str:
    before = dispatcher.mode
    if before == "running":
        return "already running"
    dispatcher.resume()
    return "study resumed" if before == "paused" else "stop cancelled. Study resumed"


def _stop(command: StopStudy, dispatcher: Dispatcher) -> str:
    dispatcher.stop(now=command.now)
    if not (busy := dispatcher.busy):
        return "stopping now. No trial is running"
    if command.now:
        return f"stopping now: waiting for {_count(busy)} to stop"
    return f"stopping: waiting for {_count(busy)} to end. No new trials will start."


def _count(jobs: list[Job]) -> str:
    kind = "trial" if all(job.stoppable for job in jobs) else "job"
    return f"1 running {kind}" if len(jobs) == 1 else f"{len(jobs)} running {kind}s"
