"""Studies that are steered while they run: real drivers, fake trainers, a person in a thread."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sweeper.commands.run_study import run_study
from sweeper.commands.steer import APPLIED, KEPT, REFUSED, CommandReply, standing, steer
from sweeper.core.errors import StudyError
from sweeper.core.outcome import StopCause
from sweeper.core.paths import StudyFolder, read_json
from sweeper.core.signals import StopSignal
from sweeper.driver import command_handler, command_log
from sweeper.driver.arm_probe import ProbeJob
from sweeper.driver.budget import StudyBudget
from sweeper.driver.command_files import (
    CloneTrial,
    CommandInbox,
    EnqueuePoint,
    ExtendArm,
    PauseStudy,
    ResumeStudy,
    StopStudy,
    StopTrial,
    StudyCommand,
    send,
)
from sweeper.driver.command_handler import CommandHandler
from sweeper.driver.command_log import CommandLog
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.jobs import JobList, JobPhase
from sweeper.driver.pause_clock import PauseClock
from sweeper.driver.running_trial import RunningTrial
from sweeper.driver.status_writer import StatusWriter
from sweeper.driver.study_state import StudyState
from sweeper.driver.study_supervisor import StudySupervisor
from sweeper.driver.worker_pool import WorkerPool
from sweeper.reporting.console import make_console
from sweeper.reporting.live_view import QuietView
from sweeper.reporting.results import StudyResults
from sweeper.reporting.study_progress import StudyProgress
from sweeper.reporting.study_status import ArmStatus, StudyStatus, is_driven
from sweeper.search.study import DROPPED, QUEUED_BY, REFINES
from sweeper.search.study_plan import studies
from sweeper.search.telling import counts
from sweeper.workers.protocol import Engine, SlotsEvent, Work, WorkerEvent, lost

NAME = "lr_rank_sweep"
FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("pruner=none", "sampler=random", "finalists=none", "hydra.sweeper.n_trials=3"),
    *("workers.fake.step_seconds=0.02", "hydra.sweeper.priors=[]"),
)
ONLY_LORA = "~hydra.sweeper.arms.full"
SLOWLY = "workers.fake.step_seconds=0.1"
"""Two seconds a trial: enough for a person to say something."""
POINT = {"adapter.r": "32", "training.learning_rate": "2e-3"}
PATIENCE_S = 30.0


class Person(threading.Thread):
    """Somebody at another terminal."""

    def __init__(self, folder: StudyFolder, acts: Callable[[Person], None]) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self._acts = acts
        self.error: BaseException | None = None

    def run(self) -> None:
        """See Thread."""
        try:
            self._acts(self)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self.error = error
            send(self.folder, StopStudy(now=True))

    def says(self, command: StudyCommand) -> CommandReply:
        """Send a command and wait for its answer."""
        return steer(self.folder, command, PATIENCE_S)

    def sees(self) -> StudyStatus:
        """Where the study stands."""
        return standing(self.folder)

    def waits(self, until: Callable[[], bool]) -> None:
        """Until something is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.01)

    def waits_for_training(self, number: int, arm: str = "lora") -> None:
        """Until a trial has been judged once, and is about to take further steps."""
        spool = self.folder.trial(arm, number).metrics
        self.waits(lambda: spool.exists() and bool(spool.read_text()))


def _folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / NAME)


def _run(tmp_path: Path, *overrides: str) -> StudyResults:
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    return run_study(plan)


def _steered(tmp_path: Path, acts: Callable[[Person], None], *overrides: str) -> None:
    """Run a study while a person acts; a stop is no error."""
    person = Person(_folder(tmp_path), acts)
    person.start()
    try:
        _run(tmp_path, *overrides)
    except KeyboardInterrupt:
        pass
    finally:
        person.join(PATIENCE_S)
    if person.error is not None:
        raise person.error


def _trials(tmp_path: Path, arm: str = "lora") -> list[FrozenTrial]:
    storage = f"sqlite:///{tmp_path / NAME / 'study.db'}"
    return optuna.load_study(study_name=f"{NAME}/{arm}", storage=storage).trials


def _arm(found: StudyStatus, name: str = "lora") -> ArmStatus:
    return next(arm for arm in found.arms if arm.name == name)


def _steps(tmp_path: Path, number: int) -> list[int]:
    lines = _folder(tmp_path).trial("lora", number).metrics.read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_paused_trial_goes_on_where_it_was_and_what_was_asked_comes_next(tmp_path: Path) -> None:
    """Nothing is trained in the pause; then the same attempt ends, each step taken once, and a
    partial point and a changed copy are tried before anything that the sampler draws."""
    answers: dict[str, CommandReply] = {}

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        answers["pause"] = person.says(PauseStudy())
        person.waits(lambda: person.sees().running[0].state == "paused")
        before = _steps(tmp_path, 0)
        assert before[-1] < 20
        answers["enqueue"] = person.says(EnqueuePoint(values=POINT))
        answers["again"] = person.says(EnqueuePoint(values=POINT))
        answers["outside"] = person.says(EnqueuePoint(values={"adapter.r": "3"}))
        answers["clone"] = person.says(
            CloneTrial(trial=0, values={"training.learning_rate": "1e-2"})
        )
        answers["extend"] = person.says(ExtendArm(trials=1))
        answers["paused"] = person.says(PauseStudy())
        found = person.sees()
        assert (found.state, [trial.trial for trial in found.running]) == ("paused", ["lora/0000"])
        assert (_arm(found).wanted, len(_arm(found).queue)) == (3, 2)
        assert _steps(tmp_path, 0) == before
        assert _trials(tmp_path)[0].state is TrialState.RUNNING
        answers["resume"] = person.says(ResumeStudy())
        answers["resumed"] = person.says(ResumeStudy())

    _steered(tmp_path, acts, ONLY_LORA, "hydra.sweeper.n_trials=2", SLOWLY)
    assert {name: (reply.exit_code, reply.text) for name, reply in answers.items()} == {
        "pause": (APPLIED, "pausing: waiting for 1 running trial to stop"),
        "enqueue": (APPLIED, "next trial of arm lora: learning_rate=0.002, r=32"),
        "again": (REFUSED, "this very point waits in the queue already"),
        "outside": (REFUSED, "adapter.r=3: not in choice(2, 4, 8, 16, 32)"),
        "clone": (APPLIED, answers["clone"].text),
        "extend": (APPLIED, "arm lora extended from 2 to 3 trials"),
        "paused": (APPLIED, "already paused"),
        "resume": (APPLIED, "study resumed"),
        "resumed": (APPLIED, "already running"),
    }
    first, second, third = _trials(tmp_path)
    assert {trial.user_attrs["attempt"] for trial in (first, second, third)} == {1}
    assert {trial.user_attrs["cause"] for trial in (first, second, third)} == {"finished"}
    assert _steps(tmp_path, 0) == [4, 8, 12, 16, 20]
    assert (second.params["adapter.r"], second.params["training.learning_rate"]) == (32, 2e-3)
    assert third.params == {**first.params, "training.learning_rate": 1e-2}
    assert third.user_attrs["clone_of"] == 0
    assert _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2").arms[0].n_trials == 3


@pytest.mark.slow
def test_pause_and_resume_in_a_hurry_lose_nothing(tmp_path: Path) -> None:
    """Commands that cross the trials' last steps, and garbage among them: three trials, one attempt
    each, and one more for the command after the garbage."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        (person.folder.inbox / "garbage.json").write_bytes(b"\x00\xff{")
        for _ in range(5):
            for command in (PauseStudy(), ResumeStudy(), PauseStudy()):
                send(person.folder, command)
            assert person.says(ResumeStudy()).exit_code == APPLIED
        assert (person.folder.inbox / "garbage.json.damaged").exists()
        assert person.says(ExtendArm(trials=1)).exit_code == APPLIED

    _steered(tmp_path, acts, ONLY_LORA, SLOWLY)
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"] * 4
    assert [trial.user_attrs["attempt"] for trial in _trials(tmp_path)] == [1] * 4


@pytest.mark.slow
def test_arms_that_have_not_begun_or_have_ended_are_steered_as_well(tmp_path: Path) -> None:
    """A point waits for its arm; an arm that had ended is opened again when it is extended; a grid
    is extended to its end, every point once, and no further."""
    answers: list[CommandReply] = []

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        rate = {"training.learning_rate": "3e-3"}
        answers.append(steer(person.folder, EnqueuePoint(values=rate, arm="full"), 0.2))
        answers.append(person.says(EnqueuePoint(values=rate, arm="fill")))
        person.waits_for_training(0, "full")
        answers.append(person.says(ExtendArm(trials=1, arm="lora")))
        answers.append(person.says(ExtendArm(trials=9, arm="full")))
        answers.append(person.says(ExtendArm(trials=1, arm="full")))

    few = ("hydra.sweeper.n_trials=1", "hydra.sweeper.arms.full.n_trials=2", SLOWLY)
    _steered(tmp_path, acts, *few)
    assert answers[0].exit_code == KEPT
    assert [(reply.exit_code, reply.text) for reply in answers[1:]] == [
        (REFUSED, "--arm fill: no such arm. Choose lora, full"),
        (APPLIED, "arm lora extended from 1 to 2 trials"),
        (APPLIED, "arm full extended from 2 to 5 trials"),
        (REFUSED, "arm full already tries all 5 points of its grid"),
    ]
    assert sum(map(counts, _trials(tmp_path))) == 2
    tried = sorted(_trials(tmp_path, "full"), key=lambda trial: str(trial.datetime_start))
    # Once it is whole, the grid is refined.
    grid = [trial for trial in tried if REFINES not in trial.user_attrs]
    rates = [trial.params["training.learning_rate"] for trial in grid]
    assert rates[0] == 3e-3
    assert sorted(rates) == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


def test_a_trial_of_a_killed_driver_is_dropped_before_a_worker_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver with two trials was killed, and the next one has a single worker: the second waits."""
    answers: list[CommandReply] = []

    def killed(self: RunningTrial, engine: Engine, worker: int) -> JobPhase:
        raise SystemExit

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        answers.extend(person.says(StopTrial(trial=1)) for _ in range(2))

    overrides = (ONLY_LORA, "hydra.sweeper.n_trials=2", SLOWLY)
    with monkeypatch.context() as patch:
        patch.setattr(RunningTrial, "send", killed)
        with pytest.raises(SystemExit):
            _run(tmp_path, *overrides)
    storage = f"sqlite:///{tmp_path / NAME / 'study.db'}"
    optuna.load_study(study_name=f"{NAME}/lora", storage=storage).ask()
    assert [trial.state for trial in _trials(tmp_path)] == [TrialState.RUNNING] * 2
    _steered(tmp_path, acts, *overrides)
    assert [reply.text for reply in answers] == [
        "lora/0001 stopped for good",
        "lora/0001 is not running. Running now: lora/0000",
    ]
    first, dropped, other = _trials(tmp_path)
    assert (dropped.user_attrs["cause"], dropped.state) == ("cancelled", TrialState.FAIL)
    assert DROPPED in dropped.user_attrs
    assert not _folder(tmp_path).trial("lora", 1).metrics.exists()
    assert [trial.user_attrs["cause"] for trial in (first, other)] == ["finished", "finished"]


def test_single_trials_are_ended_for_good(tmp_path: Path) -> None:
    """One that runs and one that is paused: FAIL with cause cancelled, never asked again, without
    resume state, and replaced by another one of n_trials."""
    answers: list[str] = []

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        answers.append(person.says(StopTrial(trial=7)).text)
        answers.append(person.says(StopTrial(trial=0)).text)
        person.waits_for_training(1)
        person.says(PauseStudy())
        person.waits(lambda: person.sees().running[0].state == "paused")
        answers.append(person.says(StopTrial(trial=1, arm="lora")).text)
        person.says(ResumeStudy())

    _steered(tmp_path, acts, ONLY_LORA, "hydra.sweeper.n_trials=1", SLOWLY)
    assert answers == [
        "lora/0007 is not running. Running now: lora/0000",
        "lora/0000 stopped for good",
        "lora/0001 stopped for good",
    ]
    *ended, last = _trials(tmp_path)
    assert [trial.user_attrs["cause"] for trial in ended] == ["cancelled", "cancelled"]
    assert last.user_attrs["cause"] == "finished"
    for trial in ended:
        assert trial.state is TrialState.FAIL
        assert trial.user_attrs["outcome"]["message"] == "stopped by hand"
        assert trial.params != last.params
        assert not _folder(tmp_path).trial("lora", trial.number).checkpoints.exists()


def test_stop_lets_the_running_trial_end_and_starts_none(tmp_path: Path) -> None:
    """It can be taken back until then; in the end the state is stopped, and the same command
    completes the total."""
    answers: list[str] = []

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        for command in (StopStudy(), PauseStudy(), ResumeStudy(), StopStudy()):
            answers.append(person.says(command).text)

    _steered(tmp_path, acts, ONLY_LORA, "hydra.sweeper.n_trials=2", SLOWLY)
    assert answers == [
        "stopping: waiting for 1 running trial to end. No new trials will start.",
        "the study is stopping. Cancel the stop with `study resume`, then pause it",
        "stop cancelled. Study resumed",
        "stopping: waiting for 1 running trial to end. No new trials will start.",
    ]
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"]
    assert standing(_folder(tmp_path)).state == "stopped"
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2")
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"] * 2
    assert standing(_folder(tmp_path)).state == "finished"


def test_a_stop_in_a_pause_ends_the_study(tmp_path: Path) -> None:
    """Nothing is trained, so nothing is waited for; the next run continues the paused trial."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        person.says(PauseStudy())
        person.waits(lambda: person.sees().running[0].state == "paused")
        assert person.says(StopStudy()).text == "stopping now. No trial is running"

    _steered(tmp_path, acts, ONLY_LORA, "hydra.sweeper.n_trials=1", SLOWLY)
    assert standing(_folder(tmp_path)).state == "stopped"
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1")
    paused, continued = _trials(tmp_path)
    assert (paused.user_attrs["cause"], continued.user_attrs["cause"]) == ("cancelled", "finished")
    assert continued.user_attrs["continues"] == 0
    assert _steps(tmp_path, 1) == [4, 8, 12, 16, 20]


def test_finalists_are_paused_like_trials(tmp_path: Path) -> None:
    """Set aside, continued, and judged; what comes too late for a search is refused."""

    def acts(person: Person) -> None:
        spools = tmp_path / NAME / "lora" / "finalists"
        person.waits(lambda: any(spools.glob("*/metrics.jsonl")))
        assert person.says(PauseStudy()).exit_code == APPLIED
        refused = person.says(ExtendArm(trials=1))
        assert refused.exit_code == REFUSED
        assert "every search of this study has ended" in refused.text
        assert person.says(StopTrial(trial=0)).exit_code == REFUSED
        person.waits(lambda: person.sees().running[0].state == "paused")
        person.says(ResumeStudy())

    one = ("finalists=tiny", "hydra.sweeper.finalists.fresh_seeds=1")
    small = (ONLY_LORA, *one, "hydra.sweeper.n_trials=1")
    _steered(tmp_path, acts, *small, SLOWLY)
    (folder,) = (tmp_path / NAME / "lora" / "finalists").glob("trial_*")
    outcome = read_json(folder / "outcome.json")
    assert (outcome["cause"], outcome["steps"]) == ("finished", 20)


def test_commands_without_a_driver_are_kept_and_obeyed_at_the_next_start(tmp_path: Path) -> None:
    """Extend and enqueue wait for the same command; a pause is refused at once."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1")
    folder = _folder(tmp_path)
    assert not is_driven(folder)
    reply = steer(folder, ExtendArm(trials=1), 0.1)
    assert reply.exit_code == KEPT
    assert "The command is kept for its next start" in reply.text
    assert f"python -m sweeper {standing(folder).command}" in reply.text
    assert steer(folder, EnqueuePoint(values={"adapter.r": "32"}), 0.1).exit_code == KEPT
    assert steer(folder, EnqueuePoint(values={"adapter.r": "33"}), 0.1).exit_code == KEPT
    assert steer(folder, PauseStudy(), 0.1) == CommandReply(
        REFUSED, "the study is not running, so there is nothing to pause"
    )
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1")
    assert len(_trials(tmp_path)) == 2
    assert _trials(tmp_path)[1].params["adapter.r"] == 32
    answers = [entry["answer"] for entry in read_json(folder.steering)["commands"].values()]
    assert [answer["ok"] for answer in answers] == [True, True, False]
    assert list(folder.inbox.iterdir()) == []


class Devices:
    """An engine without workers: kills and stops are written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.killed: list[int] = []
        self.words: list[str] = []
        self.events: list[WorkerEvent] = [
            SlotsEvent(worker=0, free=1),
            SlotsEvent(worker=1, free=1),
        ]

    def clock(self) -> float:
        """A clock that only the test moves."""
        return self.now

    def send(self, worker: int, work: Work) -> None:
        """See Engine."""

    def proceed(self, job: str, step: int) -> None:
        """See Engine."""

    def stop(self, job: str, cause: StopCause) -> None:
        """See Engine."""

    def kill(self, worker: int, reason: str) -> None:
        """See Engine."""
        self.killed.append(worker)

    def next_event(self, timeout_s: float) -> WorkerEvent | None:
        """See Engine."""
        return self.events.pop(0) if self.events else None

    def close(self) -> None:
        """See Engine."""


@dataclass
class Steered:
    """A dispatcher with the supervisor of a study, turned by hand."""

    folder: StudyFolder
    devices: Devices
    state: StudyState
    budget: StudyBudget
    commands: CommandHandler
    dispatcher: Dispatcher

    def turn(self, source: JobList[ProbeJob] | None = None) -> None:
        """Run the loop's parts once, as often as there are events."""
        self.dispatcher._source = source or self.dispatcher._source
        for _ in range(1 + len(self.devices.events)):
            self.dispatcher._hand_out()
            if (event := self.dispatcher._listen()) is not None:
                self.dispatcher._route(event)
            self.dispatcher._attend()


def _steered_by_hand(tmp_path: Path, *overrides: str) -> Steered:
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    devices, folder = Devices(), _folder(tmp_path)
    budget = StudyBudget(plan.study.budget, True, devices.clock)
    state, log = StudyState(plan, StudyProgress(plan.objective)), CommandLog(folder)
    state.raise_totals(log.totals)
    status, say = StatusWriter(state, folder, devices.clock), devices.words.append
    commands = CommandHandler(state, CommandInbox(folder), log, status, say)
    pool = WorkerPool()
    pool.host_with(devices)
    supervisor = StudySupervisor(commands, status, state.board, QuietView(make_console()))
    clock = PauseClock(budget.paused, devices.clock)
    dispatcher = Dispatcher(pool, StopSignal(), say, supervisor, clock)
    return Steered(folder, devices, state, budget, commands, dispatcher)


def test_a_pause_ends_the_workers_once_nothing_is_trained(tmp_path: Path) -> None:
    """They keep the base model on their devices; a job that is slow to stop has 20 s."""
    steered = _steered_by_hand(tmp_path)
    devices = steered.devices
    probe = ProbeJob("lora", steered.state.plan.arms[0].settings.trial)
    steered.turn(JobList([probe]))
    send(steered.folder, PauseStudy())
    steered.turn()
    devices.now = 19.0
    steered.turn()
    assert devices.killed == []
    devices.now = 21.0
    steered.turn()
    steered.turn()
    assert devices.killed == [0]
    devices.events = [lost(0, None, "paused", "")]
    steered.turn()
    steered.turn()
    assert devices.killed == [0, 1]
    assert (probe.phase, probe.attempt) == (JobPhase.QUEUED, 1)
    assert "paused after 21 s: all workers ended, their devices are free" in devices.words


def test_a_pause_takes_no_wall_clock_time(tmp_path: Path) -> None:
    """An hour's limit, ten minutes used, two hours paused: fifty minutes are left."""
    steered = _steered_by_hand(tmp_path, "hydra.sweeper.budget.wall_clock=1h")
    arm, devices = steered.budget.of_arm(1.0, 0.0), steered.devices
    devices.now = 600.0
    send(steered.folder, PauseStudy())
    steered.turn()
    devices.now += 3600.0
    steered.turn()
    assert arm.left([]) == "50 min 00 s left"
    devices.now += 3600.0
    send(steered.folder, ResumeStudy())
    steered.turn()
    assert arm.left([]) == steered.budget.of_arm(1.0, 0.0).left([]) == "50 min 00 s left"


def test_commands_to_an_earlier_driver_are_refused(tmp_path: Path) -> None:
    """A pause or a stop left over by a kill does not hold the next run; a larger total stands."""
    for command in (PauseStudy(), StopStudy(now=True), ExtendArm(trials=4)):
        send(_folder(tmp_path), command)
    steered = _steered_by_hand(tmp_path)
    steered.commands.catch_up()
    assert steered.dispatcher.mode == "running"
    assert steered.state.total("lora") == 7
    words = "study pause: refused: it was meant for an earlier run of this study"
    assert words in steered.devices.words[0]
    assert _steered_by_hand(tmp_path).state.total("lora") == 7


def test_a_full_disk_does_not_end_a_study_for_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status is written when there is room again."""
    steered = _steered_by_hand(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sweeper.driver.status_writer.write_json", full)
        steered.turn()
        assert not steered.folder.standing.exists()
    steered.devices.now += 60.0
    steered.turn()
    assert standing(steered.folder).study_name == NAME


def test_a_damaged_record_is_named_with_the_way_out(tmp_path: Path) -> None:
    """steering.json is the driver's own: an edit that cannot be read is an error with the way out."""
    folder = _folder(tmp_path)
    folder.path.mkdir(parents=True)
    folder.steering.write_text('{"totals": {"lora": "many"}}', encoding="utf-8")
    with pytest.raises(StudyError, match="Move it away to continue"):
        _steered_by_hand(tmp_path)


KILLED = """
import os, signal, sys
from sweeper.driver import command_handler
from sweeper.search.study_plan import studies
from sweeper.commands.run_study import run_study
moment, arguments = sys.argv[1], sys.argv[2:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if moment == 'before it is written down':
    queue = command_handler.queue
    command_handler.queue = lambda *given: (queue(*given), die())
else:
    command_handler.CommandInbox.answer = die
run_study(studies(arguments)[0])
"""


@pytest.mark.parametrize(
    "moment",
    [
        "before it is written down",
        pytest.param("before it is answered", marks=pytest.mark.slow),
    ],
)
def test_kill_9_between_reading_and_answering_applies_a_command_once(
    tmp_path: Path, moment: str
) -> None:
    """Killed after the effect, before or after it is written down: 1 + 1 trials, one of them r=32."""
    folder = _folder(tmp_path)
    for command in (EnqueuePoint(values={"adapter.r": "32"}), ExtendArm(trials=1)):
        send(folder, command)
    arguments = [*FAKE, f"output_dir={tmp_path}", ONLY_LORA, "hydra.sweeper.n_trials=1"]
    killed = [sys.executable, "-c", KILLED, moment, *arguments]
    died = subprocess.run(killed, capture_output=True, check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list(folder.inbox.iterdir()) != []
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1")
    ranks = [trial.params["adapter.r"] for trial in _trials(tmp_path)]
    assert len(ranks) == 2
    assert ranks[0] == 32
    assert sum(QUEUED_BY in trial.user_attrs for trial in _trials(tmp_path)) == 1
    assert len(read_json(folder.steering)["commands"]) == 2
    assert list(folder.inbox.iterdir()) == []


def test_a_stop_at_once_cannot_be_cancelled(tmp_path: Path) -> None:
    """Commands that arrive together with `stop --now` are told that it is too late."""
    steered = _steered_by_hand(tmp_path)
    for command in (StopStudy(now=True), ResumeStudy(), PauseStudy()):
        send(steered.folder, command)
    steered.turn()
    too_late = "refused: the study stops at once. The same command continues it later"
    assert steered.devices.words == [
        "study stop --now: stopping now. No trial is running",
        f"study resume: {too_late}",
        f"study pause: {too_late}",
    ]
    assert steered.dispatcher.mode == "stopping"


def test_thousands_of_commands_share_the_loop_with_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One turn obeys what fits into it, and writes the record once; in the end each has its effect."""
    steered = _steered_by_hand(tmp_path)
    for _ in range(300):
        send(steered.folder, ExtendArm(trials=1))
    written = []
    write = command_log.write_json
    monkeypatch.setattr(command_log, "write_json", lambda *a: (written.append(a), write(*a)))
    times = iter(float(number) / 100 for number in range(10**6))
    monkeypatch.setattr(command_handler.time, "monotonic", lambda: next(times))
    turns = 0
    while list(steered.folder.inbox.iterdir()):
        steered.turn()
        turns += 1
    assert 5 < turns < 100
    assert len(written) < 30
    assert steered.state.total("lora") == 303
    assert len(list(steered.folder.outbox.iterdir())) == 300


def test_a_command_on_a_full_disk_has_its_effect_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is answered when there is room again, and the study goes on meanwhile."""
    steered = _steered_by_hand(tmp_path)
    send(steered.folder, ExtendArm(trials=4))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sweeper.driver.command_log.write_json", full)
        for _ in range(3):
            steered.turn()
        assert len(list(steered.folder.inbox.iterdir())) == 1
    steered.turn()
    assert list(steered.folder.inbox.iterdir()) == []
    assert steered.state.total("lora") == 7
    assert sum("answered later" in words for words in steered.devices.words) == 1
