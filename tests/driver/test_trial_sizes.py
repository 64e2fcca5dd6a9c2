"""Every point is checked before it is trained, whatever a worker answers."""

from __future__ import annotations

import re
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sweeper.commands.run_study import run_study
from sweeper.commands.run_trial import run_single
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import StudyError, TrialFailed
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import TrialSize
from sweeper.core.paths import TrialFolder, read_json
from sweeper.driver.jobs import JobPhase
from sweeper.driver.running_trial import RunningTrial
from sweeper.reporting.rank_ladder import rank_ladders
from sweeper.reporting.result_tables import leaderboard
from sweeper.reporting.results import StudyResults
from sweeper.search.study_plan import studies
from sweeper.search.telling import counts
from sweeper.workers.fake_runner import FakeRunner
from sweeper.workers.local_engine import LocalEngine
from sweeper.workers.protocol import (
    CheckCommand,
    CheckedEvent,
    EndedEvent,
    Engine,
    Work,
    WorkerEvent,
)
from tests.conftest import make_settings

LORA = ("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full", "hydra.sweeper.study_name=s")
FAKE = ("workers=fake", "tracking=none", "pruner=none", "finalists=none")
FIXED = ("adapter.alpha_over_r=2", "training.warmup_ratio=0.03", "training.learning_rate=1e-3")
INLINE = "workers.engine=inline"
EQUAL = ("adapter.r=null", "adapter.trainable_parameters=20k")


def _run(tmp_path: Path, *overrides: str) -> StudyResults:
    given = {text.partition("=")[0] for text in overrides}
    fixed = (text for text in FIXED if text.partition("=")[0] not in given)
    (plan,) = studies([*LORA, *FAKE, *fixed, f"output_dir={tmp_path}", *overrides])
    return run_study(plan)


def _trials(tmp_path: Path, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{tmp_path / name / 'study.db'}"
    return optuna.load_study(study_name=f"{name}/lora", storage=storage).trials


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[TrialSettings]:
    """What the fake runner is asked to check; it answers as ever."""
    asked: list[TrialSettings] = []
    check = FakeRunner.check

    def asking(
        runner: FakeRunner, settings: TrialSettings, expected: InputDigests | None
    ) -> TrialSize:
        asked.append(settings)
        return check(runner, settings, expected)

    monkeypatch.setattr(FakeRunner, "check", asking)
    return asked


def test_an_impossible_point_is_never_handed_out(tmp_path: Path) -> None:
    """Refused with the worker's words and a constraint; no folder, no attempt, not counted."""
    _run(
        tmp_path,
        *(INLINE, "sampler=grid", "adapter.r=2", "hydra.sweeper.n_trials=6"),
        "adapter.target_modules=choice(no_such_module,mlp)",
        "adapter.layers_to_transform=choice(0-1,last-2,2-7)",
    )
    causes = {
        (t.params["adapter.target_modules"], t.params["adapter.layers_to_transform"]): t
        for t in _trials(tmp_path)
    }
    assert len(causes) == 6
    for (targets, layers), trial in causes.items():
        refused = targets == "no_such_module" or layers == "2-7"
        assert trial.user_attrs["cause"] == ("refused" if refused else "finished")
        assert trial.constraints == {"infeasible": 1.0 if refused else -1.0}
        assert counts(trial) is not refused
        assert ("attempt" in trial.user_attrs) is not refused
        assert (tmp_path / "s" / "lora" / f"trial_{trial.number:04d}").exists() is not refused
    refused_layers = causes["mlp", "2-7"].user_attrs["outcome"]["message"]
    assert "the model has layers 0 to 3" in refused_layers


def test_a_space_of_impossible_points_ends_after_three_times_n_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained, the arm says so and ends; the study is not an error."""
    (arm,) = _run(
        tmp_path,
        *(INLINE, "sampler=random", "adapter.r=2,4", "hydra.sweeper.n_trials=4"),
        *("adapter.target_modules=no_such_module", "training.learning_rate=interval(1e-4,1e-2)"),
    ).arms
    trials = _trials(tmp_path)
    assert {trial.user_attrs["cause"] for trial in trials} == {"refused"}
    assert 4 < len(trials) <= 3 * 4
    assert arm.best is None
    assert "arm lora ends at 0 of 4 trials" in capsys.readouterr().out


def test_one_structure_is_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine trials of two ranks, each with learning rates and alphas of its own: two checks."""
    asked = _asked(monkeypatch)
    _run(
        tmp_path,
        *(INLINE, "sampler=random", "adapter.r=2,4", "adapter.target_modules=mlp"),
        *("hydra.sweeper.n_trials=9", "training.learning_rate=interval(1e-4,1e-2)"),
        "adapter.alpha_over_r=1,2,4",
    )
    assert len(asked) == len({settings.structure for settings in asked}) == 2
    assert sum(map(counts, _trials(tmp_path))) == 9


def test_what_does_not_fit_is_infeasible(tmp_path: Path) -> None:
    """16,000 bytes for each r into a third of a MiB: r=32 is refused with need and have."""
    _run(
        tmp_path,
        *(INLINE, "sampler=grid", "adapter.r=8,32", "adapter.target_modules=mlp"),
        *("hydra.sweeper.n_trials=2", "workers.fake.free_mib=0.3"),
    )
    outcomes = {t.params["adapter.r"]: t.user_attrs["outcome"] for t in _trials(tmp_path)}
    assert outcomes[8]["cause"] == "finished"
    assert outcomes[32]["cause"] == "refused"
    assert "need 0 MiB, but the device has 0 MiB" in outcomes[32]["message"]


def test_an_error_in_a_check_stops_the_study_after_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug is no property of the point: FAIL with its traceback, and no hundred of them."""

    def broken(*_: object) -> TrialSize:
        raise ZeroDivisionError("in the check")

    monkeypatch.setattr(FakeRunner, "check", broken)
    with pytest.raises(StudyError, match="ZeroDivisionError: in the check"):
        _run(tmp_path, INLINE, "adapter.target_modules=mlp", "adapter.r=2,4,8,16,32")
    assert [t.state for t in _trials(tmp_path)] == [TrialState.FAIL] * 3


def test_a_worker_that_dies_in_a_check_is_replaced_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice it answers; three times it does not, and the point ends as lost by its worker."""
    send, deaths = LocalEngine.send, [0]

    def dying(engine: LocalEngine, worker: int, message: Work) -> None:
        fatal = isinstance(message, CheckCommand) and "mlp" in message.settings.structure
        if isinstance(message, CheckCommand) and (fatal or deaths[0] < 1):
            deaths[0] += 1
            engine.kill(worker, "dies in a check")
        else:
            send(engine, worker, message)

    monkeypatch.setattr(LocalEngine, "send", dying)
    _run(
        tmp_path,
        *("workers.engine=local", "sampler=grid", "adapter.r=2", "hydra.sweeper.n_trials=2"),
        "adapter.target_modules=choice(attention,mlp)",
    )
    found = {t.params["adapter.target_modules"]: t for t in _trials(tmp_path)}
    assert found["attention"].user_attrs["cause"] == "finished"
    assert found["attention"].user_attrs["attempt"] == 2
    assert found["mlp"].user_attrs["cause"] == "timeout"
    assert deaths == [1 + 3]


def test_an_interrupt_during_a_check_loses_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point is told as cancelled, asked again by the same command, and nothing stays RUNNING."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    few = (INLINE, "sampler=grid", "adapter.r=2,4", "adapter.target_modules=mlp")
    with monkeypatch.context() as patch:
        patch.setattr(RunningTrial, "_checked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, *few, "hydra.sweeper.n_trials=2")
    assert _trials(tmp_path)[0].user_attrs["cause"] == "cancelled"
    assert TrialState.RUNNING not in {t.state for t in _trials(tmp_path)}
    _run(tmp_path, *few, "hydra.sweeper.n_trials=2")
    finished = [t.params["adapter.r"] for t in _trials(tmp_path) if counts(t)]
    assert sorted(finished) == [2, 4]


def test_two_slots_are_used_while_a_point_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the worker that is asked waits: a trial ends on the other one before the answer comes."""
    answered: list[int] = []
    running: set[str] = set()
    send, on_event = RunningTrial.send, RunningTrial.on_event

    def sent(job: RunningTrial, engine: Engine, worker: int) -> JobPhase:
        phase = send(job, engine, worker)
        if phase is JobPhase.RUNNING:
            running.add(job.key)
        return phase

    def heard(job: RunningTrial, event: WorkerEvent) -> JobPhase | None:
        if isinstance(event, CheckedEvent):
            answered.append(len(running))
        elif isinstance(event, EndedEvent):
            running.discard(job.key)
        return on_event(job, event)

    monkeypatch.setattr(RunningTrial, "send", sent)
    monkeypatch.setattr(RunningTrial, "on_event", heard)
    _run(
        tmp_path,
        *("workers.engine=local", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6"),
        *("sampler=grid", "adapter.r=2,4,8,16,32,64", "adapter.target_modules=mlp"),
        "workers.fake.step_seconds=0.05",
    )
    assert len(answered) == 6
    assert 1 in answered


def test_target_presets_are_compared_at_equal_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank that followed is what was trained, shown and repeated; it is no rank ladder."""
    results = _run(
        tmp_path,
        *(INLINE, *EQUAL, "sampler=grid", "adapter.target_modules=choice(attention,mlp)"),
        *("hydra.sweeper.n_trials=2", "finalists=tiny", "hydra.sweeper.finalists.seeds=2"),
    )
    (arm,) = results.arms
    for trial in _trials(tmp_path):
        assert trial.user_attrs["sized"] == {"trainable_parameters": 20_000, "rank": 20}
        folder = TrialFolder(tmp_path / "s" / "lora" / f"trial_{trial.number:04d}")
        adapter = read_json(folder.config)["adapter"]  # the fake runner writes JSON
        assert (adapter["r"], adapter["trainable_parameters"]) == (20, None)
    assert {trial.params["adapter.r"] for trial in arm.trials} == {20}
    assert {"r", "trainable"} < set(leaderboard(arm).columns)
    assert rank_ladders(results) == []
    ended = re.findall(r"lora/\d{4} finished.*", capsys.readouterr().out)
    assert len(ended) == 2
    assert all("r=20" in line for line in ended), "shown as each trial ends"
    configs = sorted((tmp_path / "s" / "lora" / "finalists").glob("trial_*/config.yaml"))
    assert {read_json(config)["adapter"]["r"] for config in configs} == {20}


def test_a_fork_adopts_trials_whose_rank_was_decided(tmp_path: Path) -> None:
    """They answer the same question: what was asked for is compared, not the rank that followed."""
    few = (INLINE, "sampler=grid", "hydra.sweeper.n_trials=2", *EQUAL)
    _run(tmp_path, *few, "adapter.target_modules=choice(attention,mlp)")
    fork = ("hydra.sweeper.study_name=f", "hydra.sweeper.fork_of=s", *few)
    _run(tmp_path, *fork, "adapter.target_modules=choice(attention,mlp,all-linear)")
    origins = [t.user_attrs.get("forked_from") for t in _trials(tmp_path, "f")]
    assert origins[:2] == ["s/lora/0000", "s/lora/0001"]


def test_a_single_trial_is_checked_and_its_rank_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probe, check, train: the folder says the rank; an impossible one trains nothing."""
    asked = _asked(monkeypatch)
    fake = ("workers=fake", INLINE, "tracking=none")
    folder = TrialFolder(tmp_path / "one")
    run_single(make_settings(*fake, *EQUAL), folder, "here")
    assert len(asked) == 1
    assert read_json(folder.config)["adapter"]["r"] == 20
    impossible = make_settings(*fake, "adapter.target_modules=no_such_module")
    with pytest.raises(TrialFailed, match=r"refused: .*no_such_module"):
        run_single(impossible, TrialFolder(tmp_path / "two"), "here")
    assert not TrialFolder(tmp_path / "two").config.exists()
