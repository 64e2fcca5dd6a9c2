"""Studies whose workers die or freeze in a probe, a check or a judgement, and single trials likewise."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from sweeper.commands import run_trial
from sweeper.commands.run_study import run_study
from sweeper.commands.run_trial import train_single
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import StudyError, TrialFailed
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.driver import job_waits
from sweeper.driver.arm_probe import ProbeJob
from sweeper.driver.command_files import PauseStudy, ResumeStudy, StopStudy, send, take_answer
from sweeper.driver.jobs import JobPhase
from sweeper.reporting.results import StudyResults
from sweeper.search.study_plan import studies
from sweeper.tracking.provenance import provenance
from sweeper.workers.fake_runner import FakeRunner
from sweeper.workers.inline_engine import InlineEngine
from sweeper.workers.protocol import Engine
from tests.conftest import make_settings

NAME = "lr_rank_sweep"
FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("pruner=none", "sampler=random", "finalists=none", "hydra.sweeper.n_trials=1"),
    *("workers.fake.step_seconds=0.0", "~hydra.sweeper.arms.full"),
)


def _run(tmp_path: Path, *overrides: str) -> StudyResults:
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    return run_study(plan)


def _trials(tmp_path: Path) -> list[FrozenTrial]:
    storage = f"sqlite:///{tmp_path / NAME / 'study.db'}"
    return optuna.load_study(study_name=f"{NAME}/lora", storage=storage).trials


def _hanging(request: str, limit_s: float = 0.3) -> tuple[str, str]:
    return (
        f"++workers.fake.requests={{{request}: hang}}",
        f"workers.probe_timeout_s={limit_s}",
    )


def test_a_probe_that_freezes_ends_the_study_after_three_attempts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the limit and not for ever; each attempt is announced, and the error says why."""
    with pytest.raises(StudyError, match=r"died each time.*\n.*workers\.probe_timeout_s"):
        _run(tmp_path, *_hanging("probe"))
    assert capsys.readouterr().out.count("lora probe: killed: no answer for 0.3 s") == 3


def test_a_trial_whose_check_freezes_is_lost_with_its_worker(tmp_path: Path) -> None:
    """Three attempts, then a timeout that uses budget, so that the study ends by itself."""
    _run(tmp_path, *_hanging("check"))
    (trial,) = _trials(tmp_path)
    assert trial.state is TrialState.FAIL
    outcome = trial.user_attrs["outcome"]
    assert outcome["cause"] == "timeout"
    assert outcome["message"] == "killed: no answer for 0.3 s (workers.probe_timeout_s)"


@pytest.mark.slow
def test_a_judgement_that_freezes_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The study ends without losses on unseen texts, and says of which models and why."""
    results = _run(tmp_path, "finalists=tiny", *_hanging("judge"))
    final = results.arms[0].final
    assert final is not None
    assert final.test_losses == {}
    words = "lora/0000_untuned: not judged: killed: no answer for 0.3 s (workers.probe_timeout_s)"
    assert words in capsys.readouterr().out


def _used_up(monkeypatch: pytest.MonkeyPatch, request: str) -> tuple[str, ...]:
    """Overrides of a study whose time ends at once, and whose requests hang without a limit."""
    monkeypatch.setattr(job_waits, "LAST_SECONDS", 0.3)
    hanging = f"++workers.fake.requests={{{request}: hang}}"
    return (hanging, "workers.probe_timeout_s=null", "hydra.sweeper.budget.wall_clock=2s")


def test_a_probe_that_hangs_is_not_waited_for_when_the_time_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without any other limit: the study ends, and says that it needs more time."""
    with pytest.raises(StudyError, match=r"time is used up before the base .*sweeper\.budget"):
        _run(tmp_path, *_used_up(monkeypatch, "probe"))
    printed = capsys.readouterr().out
    assert "lora probe: not waited for any longer: the time is used up" in printed
    assert "arm lora is not run: the time is used up" in printed


def test_a_check_that_hangs_is_cancelled_when_the_time_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial was not at fault, so the next run of the study tries it again."""
    results = _run(tmp_path, *_used_up(monkeypatch, "check"))
    trial, again = _trials(tmp_path)
    assert trial.user_attrs["cause"] == "cancelled"
    assert again.state is TrialState.WAITING
    assert [arm.best for arm in results.arms] == [None]


def test_a_judgement_that_hangs_costs_the_judgement_when_the_time_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of what there is: the search's best trial, without losses on unseen texts."""
    results = _run(tmp_path, "finalists=tiny", *_used_up(monkeypatch, "judge"))
    assert results.arms[0].best is not None
    final = results.arms[0].final
    assert final is not None
    assert final.test_losses == {}


def test_an_arm_that_hangs_costs_only_itself_when_the_time_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second arm's base never loads: the study ends with the answer of the first."""
    probe = FakeRunner.probe

    def hang_in_full(
        runner: FakeRunner, settings: TrialSettings, adopted: Path | None = None
    ) -> ArmBaseline:
        if settings.adapter.method == "none":
            time.sleep(3600)
        return probe(runner, settings, adopted)

    monkeypatch.setattr(FakeRunner, "probe", hang_in_full)
    overrides = [each for each in FAKE if each != "~hydra.sweeper.arms.full"]
    ends = _used_up(monkeypatch, "none")[1:]
    (plan,) = studies([*overrides, f"output_dir={tmp_path}", *ends])
    results = run_study(plan)
    assert [arm.name for arm in results.arms if arm.best is not None] == ["lora"]
    assert "arm full is not run: the time is used up" in capsys.readouterr().out


class Person(threading.Thread):
    """Sends commands as soon as the study has a status file, and keeps the answers."""

    def __init__(self, folder: StudyFolder, *commands: Any) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._commands = commands
        self.answers: list[str] = []

    def run(self) -> None:
        """See Thread."""
        while not self._folder.standing.exists():
            time.sleep(0.01)
        for command in self._commands:
            identity = send(self._folder, command)
            while (answer := take_answer(self._folder, identity)) is None:
                time.sleep(0.01)
            self.answers.append(answer.text)


def test_commands_are_obeyed_while_a_worker_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that takes for ever and has no limit: the study is paused, resumed and stopped."""
    person = Person(StudyFolder(tmp_path / NAME), PauseStudy(), ResumeStudy(), StopStudy(now=True))
    send_probe = ProbeJob.send

    def send_and_tell(job: ProbeJob, engine: Engine, worker: int) -> JobPhase:
        person.start()
        return send_probe(job, engine, worker)

    monkeypatch.setattr(ProbeJob, "send", send_and_tell)
    hanging = ("++workers.fake.requests={probe: hang}", "workers.probe_timeout_s=null")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, *hanging)
    person.join(10)
    assert person.answers == [
        "pausing: waiting for 1 running job to stop",
        "study resumed",
        "stopping now: waiting for 1 running job to stop",
    ]


class OpenedEngines(list[InlineEngine]):
    """Notes the engines that were opened and are not closed yet."""

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch the inline engines of this process."""
        start, close = InlineEngine.__init__, InlineEngine.close
        monkeypatch.setattr(
            InlineEngine,
            "__init__",
            lambda engine, *rest: (self.append(engine), start(engine, *rest))[1],
        )
        monkeypatch.setattr(
            InlineEngine, "close", lambda engine: (self.remove(engine), close(engine))[1]
        )


def _fail(*_: object, **__: object) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize("where", ["provenance", "make_tracker", "Dispatcher"])
def test_an_error_around_a_single_trial_leaves_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whatever raises between the command and the first event, the engine is closed or not opened."""
    opened = OpenedEngines()
    opened.patch(monkeypatch)
    monkeypatch.setattr(run_trial, where, _fail)
    settings = make_settings("workers=fake", "workers.engine=inline", "tracking=none")
    with pytest.raises(RuntimeError, match="planted"):
        train_single(settings, TrialFolder(tmp_path), "", Console(file=io.StringIO()))
    assert opened == []


def _no_metadata(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def _slow_git(*_: object, **__: object) -> Any:
    raise subprocess.TimeoutExpired("git", 10)


@pytest.mark.parametrize(
    ("library", "function", "broken", "key", "words"),
    [
        (metadata, "version", _no_metadata, "package.torch", "unknown: no metadata installed"),
        (subprocess, "run", _slow_git, "git.commit", "unknown: git did not answer within 10 s"),
    ],
    ids=["missing package metadata", "slow git"],
)
def test_provenance_that_cannot_be_had_is_recorded_as_unknown(
    monkeypatch: pytest.MonkeyPatch,
    library: Any,
    function: str,
    broken: Callable[..., Any],
    key: str,
    words: str,
) -> None:
    """It never keeps anything from training."""
    monkeypatch.setattr(library, function, broken)
    assert provenance("")[key] == words


def test_a_single_trial_whose_probe_freezes_fails_with_the_reason(tmp_path: Path) -> None:
    """Three attempts within the limit, then the trial's own outcome: a timeout."""
    hanging = _hanging("probe")
    settings = make_settings("workers=fake", "workers.engine=inline", "tracking=none", *hanging)
    with pytest.raises(TrialFailed, match=r"ended as timeout: killed: no answer for 0\.3 s"):
        train_single(settings, TrialFolder(tmp_path), "", Console(file=io.StringIO()))
