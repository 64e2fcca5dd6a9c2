"""Studies that are steered while they run: real drivers, fake trainers, a person in a thread."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sweeper.folders import StudyFolder, read_json
from sweeper.reporting.results import Results
from sweeper.search.inbox import (
    AnyCommand,
    Clone,
    Enqueue,
    Extend,
    Pause,
    Resume,
    Stop,
    StopTrial,
    send,
)
from sweeper.search.plan import studies
from sweeper.search.standing import ArmStanding, Standing, is_driven
from sweeper.search.states import counts
from sweeper.session import run_study
from sweeper.steer import APPLIED, KEPT, REFUSED, Reply, standing, steer

NAME = "lr_rank_sweep"
FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("pruner=none", "sampler=random", "finalists=none", "hydra.sweeper.n_trials=3"),
    "workers.fake.step_seconds=0.02",
)
ONLY_LORA = "~hydra.sweeper.arms.full"
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
            send(self.folder, Stop(now=True))

    def says(self, command: AnyCommand) -> Reply:
        """Send a command and wait for its answer."""
        return steer(self.folder, command, PATIENCE_S)

    def sees(self) -> Standing:
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


def _run(tmp_path: Path, *overrides: str) -> Results:
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


def _arm(found: Standing, name: str = "lora") -> ArmStanding:
    return next(arm for arm in found.arms if arm.name == name)


def _steps(tmp_path: Path, number: int) -> list[int]:
    lines = _folder(tmp_path).trial("lora", number).metrics.read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_paused_trial_goes_on_where_it_was_in_the_same_attempt(tmp_path: Path) -> None:
    """Nothing is trained in the pause; then the same trial ends, with each step taken once."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        reply = person.says(Pause())
        assert (reply.exit_code, reply.text) == (
            *(APPLIED, "paused; 1 trial being trained: each stops with a checkpoint"),
        )
        person.waits(lambda: person.sees().running[0].state == "paused")
        (open_trial,) = person.sees().running
        assert (person.sees().state, open_trial.trial) == ("paused", "lora/0000")
        before = _steps(tmp_path, 0)
        assert before[-1] < 20
        time.sleep(0.3)
        assert _steps(tmp_path, 0) == before
        assert _trials(tmp_path)[0].state is TrialState.RUNNING
        assert person.says(Pause()).text == "it is paused already"
        assert person.says(Resume()).text == "it goes on"
        assert person.says(Resume()).text == "it is running already"

    _steered(tmp_path, acts, ONLY_LORA)
    assert [trial.number for trial in _trials(tmp_path)] == [0, 1, 2]
    assert {trial.user_attrs["attempt"] for trial in _trials(tmp_path)} == {1}
    assert {trial.user_attrs["cause"] for trial in _trials(tmp_path)} == {"finished"}
    assert _steps(tmp_path, 0) == [4, 8, 12, 16, 20]


def test_pause_and_resume_in_a_hurry_lose_nothing(tmp_path: Path) -> None:
    """Commands that cross the trial's last steps, five times over: three trials, one attempt each."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        for _ in range(5):
            for command in (Pause(), Resume(), Pause()):
                send(person.folder, command)
            assert person.says(Resume()).exit_code == APPLIED
            time.sleep(0.05)

    _steered(tmp_path, acts, ONLY_LORA)
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"] * 3
    assert [trial.user_attrs["attempt"] for trial in _trials(tmp_path)] == [1] * 3


def test_extend_raises_the_total_of_the_live_study(tmp_path: Path) -> None:
    """Two more than asked for, in the results and for the next run of the same command as well."""

    def acts(person: Person) -> None:
        person.waits_for_training(1)
        reply = person.says(Extend(trials=2))
        assert reply.text == "arm lora now wants 5 trials instead of 3"
        assert _arm(person.sees()).wanted == 5

    _steered(tmp_path, acts, ONLY_LORA)
    assert sum(map(counts, _trials(tmp_path))) == 5
    assert _run(tmp_path, ONLY_LORA).arms[0].wanted == 5
    assert _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=6").arms[0].wanted == 6


def test_an_arm_that_had_ended_is_opened_again_when_it_is_extended(tmp_path: Path) -> None:
    """While the full arm is trained, the lora arm gets a fourth trial, after it."""

    def acts(person: Person) -> None:
        person.waits_for_training(0, "full")
        assert person.says(Extend(trials=1, arm="lora")).exit_code == APPLIED

    _steered(tmp_path, acts, "hydra.sweeper.arms.full.n_trials=2")
    assert sum(map(counts, _trials(tmp_path))) == 4
    assert sum(map(counts, _trials(tmp_path, "full"))) == 2


def test_a_grid_is_extended_to_its_end_and_no_further(tmp_path: Path) -> None:
    """Two of the five rates were asked for: three more can be had, a sixth cannot."""

    def acts(person: Person) -> None:
        person.waits_for_training(0, "full")
        reply = person.says(Extend(trials=9, arm="full"))
        assert reply.text == "arm full now wants 5 trials instead of 2"
        reply = person.says(Extend(trials=1, arm="full"))
        assert (reply.exit_code, reply.text) == (
            *(REFUSED, "arm full walks all 5 points of its grid already"),
        )

    few = ("hydra.sweeper.n_trials=1", "hydra.sweeper.arms.full.n_trials=2")
    _steered(tmp_path, acts, *few, "workers.fake.step_seconds=0.03")
    rates = sorted(trial.params["training.learning_rate"] for trial in _trials(tmp_path, "full"))
    assert rates == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


def test_enqueued_and_cloned_points_come_next(tmp_path: Path) -> None:
    """A partial point and a changed copy of trial 0, before anything the sampler draws."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        values = {"adapter.r": "32", "training.learning_rate": "2e-3"}
        reply = person.says(Enqueue(values=values))
        assert reply.text == "arm lora tries r=32, learning_rate=0.002 next"
        assert person.says(Enqueue(values=values)).text == (
            "this very point waits in the queue already"
        )
        rate = {"training.learning_rate": "1e-2"}
        assert person.says(Clone(trial=0, values=rate)).exit_code == APPLIED
        assert len(_arm(person.sees()).queue) == 2
        wrong = person.says(Enqueue(values={"adapter.r": "3"}))
        assert (wrong.exit_code, wrong.text) == (
            *(REFUSED, "adapter.r=3: not in choice(2, 4, 8, 16, 32)"),
        )

    _steered(tmp_path, acts, ONLY_LORA)
    first, second, third = _trials(tmp_path)
    assert (second.params["adapter.r"], second.params["training.learning_rate"]) == (32, 2e-3)
    assert third.params == {**first.params, "training.learning_rate": 1e-2}
    assert third.user_attrs["clone_of"] == 0


def test_a_point_for_an_arm_that_has_not_begun_waits_for_it(tmp_path: Path) -> None:
    """Kept in the inbox, and tried first of all when the arm begins."""
    answers: list[Reply] = []

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        values = {"training.learning_rate": "1e-3"}
        answers.append(steer(person.folder, Enqueue(values=values, arm="full"), 1.0))
        assert person.says(Enqueue(values=values, arm="fill")).text == (
            "--arm fill: no such arm; choose lora, full"
        )

    space = "hydra.sweeper.arms.full.params={training.learning_rate:'interval(1e-5,1e-2)'}"
    small = ("hydra.sweeper.arms.full.n_trials=1", "hydra.sweeper.arms.full.sampler=random", space)
    _steered(tmp_path, acts, *small)
    assert answers[0].exit_code == KEPT
    (trial,) = _trials(tmp_path, "full")
    assert trial.params == {"training.learning_rate": 1e-3}


def test_one_trial_is_ended_for_good(tmp_path: Path) -> None:
    """FAIL with cause cancelled, never asked again, replaced by another one of n_trials."""

    def acts(person: Person) -> None:
        person.waits_for_training(1)
        unknown = person.says(StopTrial(trial=7))
        assert (unknown.exit_code, unknown.text) == (
            *(REFUSED, "lora/0007 is not being trained; these are: lora/0001"),
        )
        assert person.says(StopTrial(trial=1)).text == "lora/0001 is ended for good"

    _steered(tmp_path, acts, ONLY_LORA)
    trials = _trials(tmp_path)
    assert [trial.user_attrs["cause"] for trial in trials] == [
        *("finished", "cancelled", "finished", "finished")
    ]
    assert trials[1].state is TrialState.FAIL
    assert trials[1].user_attrs["outcome"]["message"] == "stopped by hand"
    assert trials[1].params not in [trial.params for trial in trials if trial.number != 1]
    assert not _folder(tmp_path).trial("lora", 1).checkpoints.exists()


def test_a_paused_trial_can_be_ended_for_good(tmp_path: Path) -> None:
    """It is not trained when the pause is over."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        person.says(Pause())
        person.waits(lambda: person.sees().running[0].state == "paused")
        assert person.says(StopTrial(trial=0)).exit_code == APPLIED
        person.says(Resume())

    _steered(tmp_path, acts, ONLY_LORA)
    causes = [trial.user_attrs["cause"] for trial in _trials(tmp_path)]
    assert causes == ["cancelled", "finished", "finished", "finished"]


def test_stop_lets_the_running_trial_end_and_starts_none(tmp_path: Path) -> None:
    """One finished trial, state stopped; the same command completes the total."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        reply = person.says(Stop())
        assert reply.text == "it ends after the 1 trial being trained; none is started"
        refused = person.says(Pause())
        assert refused.exit_code in (REFUSED, KEPT)

    _steered(tmp_path, acts, ONLY_LORA)
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"]
    assert standing(_folder(tmp_path)).state == "stopped"
    _run(tmp_path, ONLY_LORA)
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"] * 3
    assert standing(_folder(tmp_path)).state == "finished"


def test_a_stop_can_be_taken_back(tmp_path: Path) -> None:
    """As long as the last trial runs."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        person.says(Stop())
        assert person.says(Resume()).text == "the stop is taken back; it goes on"

    _steered(tmp_path, acts, ONLY_LORA, "workers.fake.step_seconds=0.1")
    assert [trial.user_attrs["cause"] for trial in _trials(tmp_path)] == ["finished"] * 3


def test_stop_now_ends_like_ctrl_c(tmp_path: Path) -> None:
    """The running trial leaves a checkpoint, from which the same command goes on."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        assert person.says(Stop(now=True)).exit_code == APPLIED

    _steered(tmp_path, acts, ONLY_LORA)
    assert _trials(tmp_path)[0].user_attrs["cause"] == "cancelled"
    _run(tmp_path, ONLY_LORA)
    assert _trials(tmp_path)[1].user_attrs["continues"] == 0
    assert sum(map(counts, _trials(tmp_path))) == 3


def test_a_stop_in_a_pause_ends_the_study(tmp_path: Path) -> None:
    """Nothing is trained, so nothing is waited for; the paused trial is continued by the next run."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        person.says(Pause())
        person.waits(lambda: person.sees().running[0].state == "paused")
        assert person.says(Stop()).text == "it ends now; nothing is being trained"

    _steered(tmp_path, acts, ONLY_LORA)
    assert standing(_folder(tmp_path)).state == "stopped"
    _run(tmp_path, ONLY_LORA)
    assert _steps(tmp_path, 1) == [4, 8, 12, 16, 20]
    assert sum(map(counts, _trials(tmp_path))) == 3


def test_finalists_are_paused_like_trials(tmp_path: Path) -> None:
    """Set aside, continued, and judged; what comes too late for a search is refused."""

    def acts(person: Person) -> None:
        spools = tmp_path / NAME / "lora" / "finalists"
        person.waits(lambda: any(spools.glob("*/metrics.jsonl")))
        assert person.says(Pause()).exit_code == APPLIED
        refused = person.says(Extend(trials=1))
        assert refused.exit_code == REFUSED
        assert "every search of this study has ended" in refused.text
        assert person.says(StopTrial(trial=0)).exit_code == REFUSED
        person.waits(lambda: person.sees().running[0].state == "paused")
        person.says(Resume())

    _steered(
        tmp_path,
        acts,
        *(ONLY_LORA, "finalists=tiny", "hydra.sweeper.n_trials=1"),
        "workers.fake.step_seconds=0.05",
    )
    (folder,) = (tmp_path / NAME / "lora" / "finalists").glob("trial_*")
    outcome = read_json(folder / "outcome.json")
    assert (outcome["cause"], outcome["steps"]) == ("finished", 20)


def test_commands_without_a_driver_are_kept_and_obeyed_at_the_next_start(tmp_path: Path) -> None:
    """Extend and enqueue wait for the same command, a pause is refused at once."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1")
    folder = _folder(tmp_path)
    assert not is_driven(folder)
    reply = steer(folder, Extend(trials=1), 0.1)
    assert reply.exit_code == KEPT
    assert "kept until it is started again" in reply.text
    assert f"python -m sweeper {standing(folder).command}" in reply.text
    assert steer(folder, Enqueue(values={"adapter.r": "32"}), 0.1).exit_code == KEPT
    assert steer(folder, Enqueue(values={"adapter.r": "33"}), 0.1).exit_code == KEPT
    assert steer(folder, Pause(), 0.1) == Reply(
        REFUSED, "it is not running: there is nothing to pause"
    )
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1")
    assert len(_trials(tmp_path)) == 2
    assert _trials(tmp_path)[1].params["adapter.r"] == 32
    answers = [entry["answer"] for entry in read_json(folder.steering)["commands"].values()]
    assert [answer["ok"] for answer in answers] == [True, True, False]
    assert list(folder.inbox.iterdir()) == []


def test_a_pause_for_a_driver_that_is_gone_does_not_pause_the_next(tmp_path: Path) -> None:
    """Left over by a kill, it is answered and forgotten; so is a stop."""
    folder = _folder(tmp_path)
    for command in (Pause(), Stop(now=True)):
        send(folder, command)
    _run(tmp_path, ONLY_LORA)
    assert sum(map(counts, _trials(tmp_path))) == 3
    answers = [entry["answer"] for entry in read_json(folder.steering)["commands"].values()]
    assert [answer["ok"] for answer in answers] == [False, False]
    assert "an earlier run" in answers[0]["text"]


def test_damaged_commands_stop_nothing(tmp_path: Path) -> None:
    """Garbage in the inbox is said and set aside while the study goes on."""

    def acts(person: Person) -> None:
        person.waits_for_training(0)
        (person.folder.inbox / "garbage.json").write_bytes(b"\x00\xff{")
        person.waits(lambda: (person.folder.inbox / "garbage.json.damaged").exists())
        assert person.says(Extend(trials=1)).exit_code == APPLIED

    _steered(tmp_path, acts, ONLY_LORA)
    assert sum(map(counts, _trials(tmp_path))) == 4


KILLED = """
import os, signal, sys
from sweeper.search import steering
from sweeper.search.plan import studies
from sweeper.session import run_study
names, arguments = sys.argv[1].split(','), sys.argv[2:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
owner = steering if names[0] == 'steering' else getattr(steering, names[0])
setattr(owner, names[1], die)
run_study(studies(arguments)[0])
"""


@pytest.mark.parametrize("moment", ["steering,write_json", "Inbox,answer"])
def test_kill_9_between_reading_and_answering_applies_a_command_once(
    tmp_path: Path, moment: str
) -> None:
    """Killed before or after the effect is written down, the next run ends with 3 + 1 trials."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2")
    folder = _folder(tmp_path)
    for command in (Extend(trials=1), Enqueue(values={"adapter.r": "32"})):
        assert steer(folder, command, 0.1).exit_code == KEPT
    arguments = [*FAKE, f"output_dir={tmp_path}", ONLY_LORA]
    killed = [sys.executable, "-c", KILLED, moment, *arguments]
    died = subprocess.run(killed, capture_output=True, check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len(list(folder.inbox.iterdir())) == 2
    _run(tmp_path, ONLY_LORA)
    assert sum(map(counts, _trials(tmp_path))) == 4 if moment == "Inbox,answer" else True
    ranks = [trial.params["adapter.r"] for trial in _trials(tmp_path)]
    assert ranks[2] == 32
    assert len(read_json(folder.steering)["commands"]) == 2
    assert list(folder.inbox.iterdir()) == []
