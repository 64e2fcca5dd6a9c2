"""Whole studies with fake trainers: whatever happens to a trial, and whatever ends the driver."""

from __future__ import annotations

import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyError, StudyLocked, StudyMismatch
from sweeper.driver import results_writer
from sweeper.driver.results_writer import ResultsWriter
from sweeper.reporting.results import StudyResults
from sweeper.search.study_plan import studies
from sweeper.search.telling import counts
from sweeper.workers import fake_runner

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    "workers.fake.step_seconds=0.0",
)
PROCESSES = ("workers.engine=local", "workers.fake.step_seconds=0.005")
"""For tests in which a worker dies, or two of them work at the same time."""
NAMED = "hydra.sweeper.study_name=lr_rank_sweep"
ONLY_LORA = "~hydra.sweeper.arms.full"


def _run(tmp_path: Path, *overrides: str) -> StudyResults:
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    return run_study(plan)


def _trials(tmp_path: Path, arm: str = "lora") -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
    return optuna.load_study(study_name=f"lr_rank_sweep/{arm}", storage=storage).trials


def _causes(tmp_path: Path) -> list[str]:
    return [trial.user_attrs["cause"] for trial in _trials(tmp_path)]


def test_a_study_runs_every_arm_to_its_total(tmp_path: Path) -> None:
    """12 LoRA trials, and the 5 rates of the full arm before those beside them; the best come first."""
    results = _run(tmp_path)
    lora, full = results.arms
    assert len(lora.trials) == 12
    grid = [trial for trial in full.trials if trial.number < 5]
    assert sorted(trial.params["training.learning_rate"] for trial in grid) == [
        *(3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    ]
    losses = [trial.value for trial in lora.trials if trial.complete]
    assert losses == sorted(losses)
    assert lora.best is lora.trials[0]


def test_results_are_whole_at_the_end_however_seldom_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no time for writing, they are written after the first trial and at the end."""
    monkeypatch.setattr(results_writer, "WRITING_SHARE", 1e-9)
    written: list[int] = []
    write = ResultsWriter.write

    def counted_write(self: ResultsWriter, results: StudyResults) -> None:
        written.append(len(results.arms[0].trials))
        write(self, results)

    monkeypatch.setattr(ResultsWriter, "write", counted_write)
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=4", "finalists=none")
    assert written == [1, 4]


def test_oom_and_divergence_are_infeasible_and_counted(tmp_path: Path) -> None:
    """An out-of-memory and a diverged trial use up budget, are never best, and end nothing."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=5", "++workers.fake.plan={0:oom,2:diverge}")
    assert _causes(tmp_path).count("oom") == 1
    assert _causes(tmp_path).count("diverged") == 1
    assert sum(map(counts, _trials(tmp_path))) == 5
    infeasible = _trials(tmp_path)[0]
    assert (infeasible.state, infeasible.value) == (TrialState.COMPLETE, 4.5)


def test_a_crash_gets_three_attempts(tmp_path: Path) -> None:
    """A trial whose worker always dies is tried three times, then FAIL; the others finish."""
    _run(
        tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=3", "++workers.fake.plan={1:crash}", *PROCESSES
    )
    crashed = _trials(tmp_path)[1]
    assert crashed.state is TrialState.FAIL
    assert crashed.user_attrs["attempt"] == 3
    assert _causes(tmp_path) == ["finished", "crash", "finished"]


@pytest.mark.slow
def test_attempts_that_end_before_the_training_are_stored(tmp_path: Path) -> None:
    """Three workers die while they check a trial: its record says three attempts, not none."""
    _run(
        *(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=1", *PROCESSES),
        "++workers.fake.requests={check: crash}",
    )
    (crashed,) = _trials(tmp_path)
    assert (crashed.state, crashed.user_attrs["attempt"]) == (TrialState.FAIL, 3)


def test_the_same_code_error_stops_the_study_once(tmp_path: Path) -> None:
    """Three identical tracebacks end the study with that traceback; nothing is left running."""
    plan = "{0:error,1:error,2:error,3:error,4:error}"
    with pytest.raises(StudyError, match="an error in the code"):
        _run(tmp_path, ONLY_LORA, f"++workers.fake.plan={plan}")
    states = [trial.state for trial in _trials(tmp_path)]
    assert states.count(TrialState.FAIL) == 3
    assert TrialState.RUNNING not in states


def test_the_same_command_on_a_finished_study_trains_nothing(tmp_path: Path) -> None:
    """Run twice: the second run adds no trial and shows the same best."""
    first = _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=3")
    second = _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=3")
    assert len(_trials(tmp_path)) == 3
    assert first.arms[0].best == second.arms[0].best


def test_a_larger_total_extends_the_study(tmp_path: Path) -> None:
    """n_trials is a total: from 3 to 5 trains two more."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=3")
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=5")
    assert sum(map(counts, _trials(tmp_path))) == 5


def test_another_question_under_the_same_name_is_refused(tmp_path: Path) -> None:
    """A changed space, setting or data set is named, with the ways out."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2")
    with pytest.raises(StudyMismatch) as caught:
        _run(
            tmp_path,
            *(ONLY_LORA, "hydra.sweeper.n_trials=2", "adapter.r=2,4"),
            "training.num_train_epochs=3",
        )
    message = str(caught.value)
    assert "space adapter.r: choice(2, 4, 8, 16, 32) then, choice(2, 4) now" in message
    assert "training.num_train_epochs: 1.0 then, 3.0 now" in message
    assert "hydra.sweeper.study_name=lr_rank_sweep_2" in message
    assert str(tmp_path / "lr_rank_sweep" / "report.html") in message
    with pytest.raises(StudyMismatch, match="data digest: fake embedded then"):
        _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2", "data.train=other.jsonl", NAMED)


def test_two_slots_are_both_used(tmp_path: Path) -> None:
    """With n_jobs=2 trials overlap in time: no batch barrier, nobody waits."""
    two = ("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6", "pruner=none")
    _run(tmp_path, ONLY_LORA, *two, *PROCESSES)
    trials = sorted(_trials(tmp_path), key=lambda trial: trial.datetime_start)
    assert any(b.datetime_start < a.datetime_complete for a, b in itertools.pairwise(trials))
    assert len(trials) == 6


def test_grid_ends_at_exhaustion(tmp_path: Path) -> None:
    """A grid of four points asked for 12 trials trains four, each once."""
    _run(
        tmp_path,
        *(ONLY_LORA, "sampler=grid", "training.learning_rate=1e-3,3e-3", "adapter.r=2,8"),
        *("adapter.alpha_over_r=2", "adapter.target_modules=mlp", "training.warmup_ratio=0.03"),
    )
    points = [tuple(trial.params.values()) for trial in _trials(tmp_path)]
    assert len(points) == len(set(points)) == 4


def test_priors_are_tried_first(tmp_path: Path) -> None:
    """Known-good points of the real space come before the sampler's own."""
    _run(tmp_path, ONLY_LORA, "space=real", "hydra.sweeper.n_trials=3")
    first, second = _trials(tmp_path)[:2]
    rates = [trial.params["training.learning_rate"] for trial in (first, second)]
    assert rates == [3e-4, 1e-3]
    assert first.params["adapter.r"] == second.params["adapter.r"] == 64


def test_a_twin_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A space of two points asked for five trials trains two, ends, and says why."""
    _run(
        tmp_path,
        *(ONLY_LORA, "sampler=random", "hydra.sweeper.n_trials=5", "adapter.r=2,8"),
        *("training.learning_rate=3e-3", "adapter.alpha_over_r=2"),
        *("adapter.target_modules=mlp", "training.warmup_ratio=0.03"),
    )
    assert _causes(tmp_path).count("finished") == 2
    assert "arm lora ends at 2 of 5 trials" in capsys.readouterr().out


def test_choices_that_are_the_same_modules_are_one_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a base without MLPs, attention and all-linear train once, and the arm says so first."""
    attention = tuple(name for name in fake_runner.FAKE_MODULES if "self_attn" in name)
    monkeypatch.setattr(fake_runner, "FAKE_MODULES", attention)
    _run(
        tmp_path,
        *(ONLY_LORA, "sampler=grid", "training.learning_rate=3e-3", "adapter.r=2"),
        *("adapter.alpha_over_r=2", "training.warmup_ratio=0.03"),
        "adapter.target_modules=attention_qv,attention,all-linear",
    )
    trained = {
        trial.params["adapter.target_modules"]
        for trial in _trials(tmp_path)
        if trial.user_attrs["cause"] != "duplicate"
    }
    assert trained == {"attention_qv", "attention"}
    words = capsys.readouterr().out
    assert "attention and all-linear are the same modules of this base" in words
    assert words.count("the same modules and settings as trial") == 1


def _start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sweeper", *FAKE, f"output_dir={tmp_path}", *overrides, "-m"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )


def _wait_for_trials(tmp_path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    database = tmp_path / "lr_rank_sweep" / "study.db"
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if database.exists():
            with sqlite3.connect(database, timeout=10) as connection:
                try:
                    (found,) = connection.execute("select count(*) from trials").fetchone()
                except sqlite3.OperationalError:
                    continue
            if found >= count:
                return
    raise AssertionError(f"no {count} trials within a minute")


SLOW = (
    *("workers.engine=local", "workers.fake.step_seconds=0.03", "pruner=none"),
    *("hydra.sweeper.n_trials=6", ONLY_LORA),
)


def test_kill_9_in_the_middle_and_the_same_command_again(tmp_path: Path) -> None:
    """Finished trials are kept, the orphan gets a second attempt, the total is exactly n_trials."""
    process = _start(tmp_path, *SLOW)
    _wait_for_trials(tmp_path, 3)
    spool = tmp_path / "lr_rank_sweep" / "lora" / "trial_0002" / "metrics.jsonl"
    while not (spool.exists() and spool.read_text()):  # in the middle of its steps
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {t.number: t.value for t in _trials(tmp_path) if t.state is TrialState.COMPLETE}
    assert len(kept) >= 2
    _run(tmp_path, *SLOW)
    trials = _trials(tmp_path)
    assert [trial.number for trial in trials] == list(range(6))
    assert all(trial.state is TrialState.COMPLETE for trial in trials)
    assert kept.items() <= {trial.number: trial.value for trial in trials}.items()
    assert max(trial.user_attrs["attempt"] for trial in trials) == 2


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupt_ends_cleanly_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM: 128 + signal, nothing RUNNING, and the same command completes the total."""
    process = _start(tmp_path, *SLOW)
    _wait_for_trials(tmp_path, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "resume" in output.lower()
    assert TrialState.RUNNING not in {trial.state for trial in _trials(tmp_path)}
    _run(tmp_path, *SLOW)
    assert sum(map(counts, _trials(tmp_path))) == 6


def test_a_continued_trial_keeps_the_rungs_it_had_passed(tmp_path: Path) -> None:
    """Interrupted behind a rung, it is a new trial to Optuna, which is told of that rung too."""
    one = (
        ONLY_LORA,
        "workers.engine=local",
        "workers.fake.step_seconds=0.1",
        "hydra.sweeper.n_trials=1",
        "pruner=median",
    )
    process = _start(tmp_path, *one)
    spool = tmp_path / "lr_rank_sweep" / "lora" / "trial_0000" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (spool.exists() and len(spool.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    _run(tmp_path, *one)
    cancelled, continued = _trials(tmp_path)
    assert (cancelled.user_attrs["cause"], continued.user_attrs["continues"]) == ("cancelled", 0)
    assert list(continued.intermediate_values) == [250, 375, 500, 625, 750]
    assert cancelled.intermediate_values.items() <= continued.intermediate_values.items()


@pytest.mark.slow
def test_interrupt_in_the_grid_arm_loses_no_point(tmp_path: Path) -> None:
    """Stopped in the middle of the full arm and started again, every rate of the grid is trained."""
    # From the recipe, LoRA's winner would have the warm-up of the full arm
    few = (*SLOW[:3], "hydra.sweeper.n_trials=1", "hydra.sweeper.priors=[]")
    process = _start(tmp_path, *few)
    spool = tmp_path / "lr_rank_sweep" / "full" / "trial_0001" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (spool.exists() and spool.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    _, full = _run(tmp_path, *few).arms
    finished = [trial for trial in full.trials if trial.complete]
    rates = {trial.params["training.learning_rate"] for trial in finished}
    assert rates >= {3e-5, 1e-4, 3e-4, 1e-3, 3e-3}
    assert (full.tried, full.refined) == (8, 3)


def test_a_finished_trial_that_was_not_told_is_not_trained_again(tmp_path: Path) -> None:
    """Its folder is complete when the driver dies before telling: the outcome is adopted."""
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", ONLY_LORA, "hydra.sweeper.n_trials=1"])
    run_study(plan)
    storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
    with sqlite3.connect(tmp_path / "lr_rank_sweep" / "study.db") as connection:
        connection.execute("update trials set state = 'RUNNING', datetime_complete = null")
        connection.execute("delete from trial_values")
        connection.execute(
            "delete from trial_user_attributes where key in ('outcome', 'cause', 'counts')"
        )
    before = (
        (tmp_path / "lr_rank_sweep" / "lora" / "trial_0000" / "outcome.json").stat().st_mtime_ns
    )
    results = run_study(plan)
    after = (tmp_path / "lr_rank_sweep" / "lora" / "trial_0000" / "outcome.json").stat().st_mtime_ns
    assert before == after
    assert results.arms[0].best is not None
    (trial,) = optuna.load_study(study_name="lr_rank_sweep/lora", storage=storage).trials
    assert trial.state is TrialState.COMPLETE


def test_mended_code_runs_after_the_same_error_stopped_the_study(tmp_path: Path) -> None:
    """Failures of earlier runs use up nothing: the study goes on to its total."""
    broken = "++workers.fake.plan={0:error,1:error,2:error}"
    with pytest.raises(StudyError):
        _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2", broken)
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.n_trials=2")
    assert sum(map(counts, _trials(tmp_path))) == 2


@pytest.mark.slow
def test_results_of_a_finished_arm_survive_a_refused_change(tmp_path: Path) -> None:
    """A mismatch in one arm leaves the results of all arms as they were."""
    small = ("hydra.sweeper.n_trials=1", "hydra.sweeper.arms.full.n_trials=1")
    _run(tmp_path, *small)
    changed = "hydra.sweeper.arms.full.overrides=['adapter=none','quantization=none','seed=3']"
    with pytest.raises(StudyMismatch, match="arm full"):
        _run(tmp_path, *small, changed)
    results = json.loads((tmp_path / "lr_rank_sweep" / "results.json").read_text())
    assert [len(arm["trials"]) for arm in results["arms"].values()] == [1, 1]


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    """Two drivers on one study: the second says who has it."""
    process = _start(tmp_path, *SLOW)
    try:
        _wait_for_trials(tmp_path, 1)
        with pytest.raises(StudyLocked, match=f"process {process.pid}"):
            _run(tmp_path, *SLOW)
    finally:
        process.kill()
        process.wait()
