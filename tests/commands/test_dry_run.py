"""A dry run shows what would be done, from the real plan, and leaves nothing behind."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from sweeper.commands import step_timing
from sweeper.commands.dry_run import (
    Timer,
    disk,
    draft,
    first_asked,
    forecast,
    points_sheet,
    show_single,
    show_study,
    space_size,
    without_dry_run,
)
from sweeper.commands.run_study import run_study
from sweeper.commands.step_timing import StepClock, time_trial
from sweeper.commands.study_forecast import planned_workers
from sweeper.commands.torch_process import Tell
from sweeper.config.settings import TrialSettings, flatten
from sweeper.config.space import Branch, Branches, Choice, Interval, Space
from sweeper.core.outcome import TrialFootprint, TrialTiming
from sweeper.core.paths import StudyFolder, write_json
from sweeper.modeling.footprint import footprint, footprint_or_problem
from sweeper.reporting.expected_gap import smallest_gap
from sweeper.reporting.results import load_results, to_document
from sweeper.search.largest_point import largest_trials
from sweeper.search.ownership import database_url
from sweeper.search.study import WORKERS, optuna_name
from sweeper.search.study_plan import StudyPlan, single, studies
from sweeper.workers.devices import DeviceSurvey
from sweeper.workers.worker_count import MachineShare
from tests.conftest import Program, make_settings
from tests.reporting.studies import FACTS, LORA_COSTS, make_arm, make_results, make_trial

MACHINE = MachineShare(1, 8000.0, DeviceSurvey(), {})
"""A machine of one core."""
NO_ANSWERS = {"evaluation": {"generation": {"num_examples": 0}}}
"""Settings of a trial as far as the timing process looks at them itself."""
STUDY = ["+experiment=lr_rank_sweep", "dry_run=true"]


def _plan(*overrides: str) -> StudyPlan:
    (plan,) = studies([*STUDY, *overrides])
    return plan


def _estimate(settings: Sequence[TrialSettings]) -> list[TrialFootprint]:
    """An estimator for tests: ten parameters a rank, a GiB each."""
    return [
        TrialFootprint(
            trainable=10 * getattr(one.adapter, "r", 100),
            total=1000,
            artifact_mib=2.0,
            peak_mib=1024.0,
            problem=None,
        )
        for one in settings
    ]


def _time(settings: Sequence[TrialSettings], threads: int, tell: Tell) -> list[TrialTiming]:
    """A timer for tests: ten steps of 2 s and two looks of 5 s, 10 s of judging and storing."""
    return [
        TrialTiming(
            source="mine.jsonl",
            rows={"train": 90, "validation": 10, "test": 321},
            dropped={"echo": 3},
            unread={"label": 7},
            steps=10,
            looks=2,
            step_s=2.0,
            look_s=5.0,
            judgement_s=1.0,
            answers_s=3.0,
            save_s=6.0,
            row_s=0.5,
            untuned_s=5.0,
            test_s=2.0,
            general_s=1.0,
            windows=16,
            start_s=15.0,
            need_mib=1500.0,
            free_mib=2000.0,
        )
        for _ in settings
    ]


def _misfit(settings: Sequence[TrialSettings], threads: int, tell: Tell) -> list[TrialTiming]:
    """A timer for tests: no trial fits."""
    return [TrialTiming(need_mib=9000.0, free_mib=2000.0) for _ in settings]


def _shown(plan: StudyPlan, timer: Timer = _time) -> str:
    console = Console(file=io.StringIO(), width=160)
    show_study(plan, console, _estimate, timer, lambda: MACHINE)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_points_are_those_that_the_study_would_try(tmp_path: Path) -> None:
    """The first random draws of a dry run are the first trials of the real study."""
    overrides = ["+experiment=lr_rank_sweep", "tracking=none", "pruner=none", "finalists=none"]
    overrides += ["workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0"]
    overrides += ["hydra.sweeper.n_trials=4", "~hydra.sweeper.arms.full", f"output_dir={tmp_path}"]
    (plan,) = studies(overrides)
    asked = first_asked(plan.arms[0], 4)
    assert len(asked) == 4
    run_study(plan)
    (arm,) = load_results("lr_rank_sweep", tmp_path).arms
    trained = sorted(arm.trials, key=lambda trial: trial.number)
    assert [trial.params for trial in trained] == asked


def test_priors_and_grids_come_first() -> None:
    """Known-good points are the first a study tries; a grid is walked in its order."""
    lora, full = _plan("space=real", "model.base_model=some/model").arms
    rates = [point["training.learning_rate"] for point in first_asked(lora, 5)]
    assert rates[:2] == [3e-4, 1e-3]
    assert first_asked(full, 5)[0]["training.learning_rate"] == 3e-5
    (_, grid) = _plan().arms
    rates = [point["training.learning_rate"] for point in first_asked(grid, 9)]
    assert rates == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


def test_sizes_of_spaces() -> None:
    """Choices and whole numbers multiply; what is continuous has no count."""
    whole = {"a": Choice((1, 2, 3)), "b": Interval(1, 8, integer=True)}
    assert space_size(whole) == "24 points"
    assert space_size({**whole, "c": Interval(0.1, 0.2)}) == "24 combinations and 1 continuous key"
    assert space_size({"c": Interval(0.1, 0.2), "d": Interval(0.1, 0.2)}) == "2 continuous keys"


def test_a_study_is_shown_with_arms_points_sizes_and_the_command() -> None:
    """Settings, both spaces, first points, disk for all trainings, and how to run it."""
    text = _shown(_plan())
    assert "base_model: embedded" in text
    assert "arm lora: 12 trials by lora" in text
    assert "training.learning_rate: tag(log, interval(0.0003, 0.03))" in text
    assert "45 combinations and 2 continuous keys" in text
    assert "arm full: 5 trials by grid" in text
    assert "adapter.method = none" in text
    assert "1,024 MiB" in text
    assert "then 3 more: the winner with 3 fresh seeds" in text
    assert "then up to 3 more: the recipe default, unless it wins" in text
    assert "36.0 MiB of artifacts" in text
    assert "run it:     python -m sweeper +experiment=lr_rank_sweep -m" in text
    assert text.index("trainings:") < text.index("arm lora:") < text.index("base_model: embedded")


def test_a_forecast_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data, all trainings, hours from timed steps, and memory, before anything is trained."""
    monkeypatch.chdir(tmp_path)
    text = _shown(_plan())
    assert "mine.jsonl: 90 train / 10 validation / 321 test rows" in text
    assert "dropped 3: 3 echo" in text
    assert "columns not read: label (7 rows)" in text
    assert "23 to 29 in all: lora 12 in the search and 3 with further seeds (and up to 3" in text
    # each of at most 29 trainings 40 s, for each arm 15 s of loading and 5 s of judging the base, for 14
    # models 2 s on the test split, and for 8 models a second on general text
    assert (
        "time:       about 20.6 min if no trial ends early: lora 18 × 40.0 s; full 11 × 40.0 s"
        in text
    )
    assert (
        "a training of arm full: 20.0 s of steps, 10.0 s of looks, 1.0 s of judging, 3.0 s of answers "
        "as long as their references, 6.0 s of loading and storing" in text
    )
    assert (
        "before the search: 5.0 s of judging the base; after it: 24.0 s of judging 10 models on 321 "
        "test rows and 4 models on 16 windows of general text" in text
    )
    assert "arm full needs about 1,500 MiB of 2,000 MiB free" in text
    assert re.search(
        r"nats per token \(a factor of 1\.\d+ in perplexity\) between arms is the smallest that 80 of "
        "100 such studies find",
        text,
    )


def test_a_busy_machine_is_said() -> None:
    """A timed trial that got a fifth of a core would take a fifth of the time alone."""

    def busy(settings: Sequence[TrialSettings], count: int, tell: Tell) -> list[TrialTiming]:
        timings = _time(settings, count, tell)
        return [timing.model_copy(update={"cpu_share": 0.2}) for timing in timings]

    assert "other programs" not in _shown(_plan())
    assert "without them at most 4.1 min" in _shown(_plan(), busy)


def test_the_forecast_counts_the_workers_of_n_jobs_auto(tmp_path: Path) -> None:
    """Two cores run two trials at a time with a thread each, and the timing has that thread."""
    threads: list[int] = []

    def timer(settings: Sequence[TrialSettings], count: int, tell: Tell) -> list[TrialTiming]:
        threads.append(count)
        return _time(settings, count, tell)

    plan, console = _plan(f"output_dir={tmp_path}"), Console(file=io.StringIO(), width=160)
    show_study(plan, console, _estimate, timer, lambda: replace(MACHINE, cores=2))
    # 6 + 4 rounds of the searches, 3 + 3 seeds and 3 of the recipe and 36 s of judging by two workers,
    # twice the start
    assert "about 10.6 min with 2 workers" in console.file.getvalue()  # type: ignore[attr-defined]
    assert threads == [1]


def test_a_study_that_ran_keeps_its_number_of_workers(tmp_path: Path) -> None:
    """The forecast counts the workers that the study has stored, as the study itself does."""
    overrides = (f"output_dir={tmp_path}", "~hydra.sweeper.arms.full")
    plan, folder = _plan(*overrides), StudyFolder(tmp_path / "lr_rank_sweep")
    assert " workers if no trial ends early" not in _shown(plan)
    assert not folder.path.exists(), "looking for a study creates none"
    folder.path.mkdir()
    study = optuna.create_study(
        storage=database_url(folder.database), study_name=optuna_name("lr_rank_sweep", "lora")
    )
    study.set_user_attr("facts", FACTS.model_dump(mode="json"))
    study.set_user_attr(WORKERS, {"jobs": 3, "threads": 2})
    assert "with 3 workers if no trial ends early" in _shown(plan)
    given = _plan(*overrides, "hydra.sweeper.n_jobs=2")
    assert "with 2 workers if no trial ends early" in _shown(given)


def test_the_largest_point_is_that_of_the_space() -> None:
    """The highest rank, the widest targets and the longest rows that are possible together."""
    targets = Choice(("attention", "all-linear"))
    space: Space = {
        "training.learning_rate": Interval(0.001, 0.01, log=True),
        "adapter.r": Choice((4, 32, 8)),
        "data.max_length": Interval(64, 128, integer=True),
        "label": Branches({"a": Branch({}, {"adapter.target_modules": targets})}, label=True),
    }
    trials = largest_trials(replace(_plan().arms[0], space=space))
    found = [flatten(one.model_dump(mode="json")) for one in trials]
    keys = ("adapter.r", "adapter.target_modules", "data.max_length")
    assert [tuple(one[key] for key in keys) for one in found] == [
        (32, "attention", 128),
        (32, "all-linear", 128),
    ]


def test_the_next_smaller_point_replaces_an_impossible_one() -> None:
    """A combination that the settings refuse is not timed, and the next smaller one is."""
    space: Space = {
        "adapter.r": Choice((8, 16)),
        "training.per_device_train_batch_size": Interval(0.5, 2.0, step=0.5),
    }
    (trial,) = largest_trials(replace(_plan().arms[0], space=space))
    assert trial.training.per_device_train_batch_size == 2
    impossible: Space = {"adapter.r": Choice((8, 16.5))}
    (trial,) = largest_trials(replace(_plan().arms[0], space=impossible))
    assert getattr(trial.adapter, "r", None) == 8


def test_the_smallest_gap_is_the_verdicts() -> None:
    """The gap shrinks with rows and seeds, and needs two fresh seeds."""
    assert smallest_gap(321, 3) == pytest.approx(0.021, abs=0.004)
    few, many = smallest_gap(321, 3), smallest_gap(100_000, 3)
    assert few is not None
    assert many is not None
    assert many < few
    assert smallest_gap(321, 1) is None


def test_an_arm_that_does_not_fit_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its time is unknown, and its memory stands beside the device's."""
    monkeypatch.chdir(tmp_path)
    text = _shown(_plan(), _misfit)
    assert "time:       unknown, because arm lora and full could not be timed" in text
    assert "arm full DOES NOT FIT: it needs about 9,000 MiB of 2,000 MiB free" in text


def test_the_first_step_is_not_taken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes what the later ones took, and what the first one took more is once a training."""
    times = iter((12.0, 13.0, 34.0, 35.0, 56.0, 57.0))
    clock = StepClock(lambda: next(times))
    causes = []
    for step in range(1, 7):  # a look of 20 s follows every second step
        causes.append(clock.stop_cause())
        if step % 2 == 0:
            clock.evaluated(step, 7, 1.0)
            causes.append(clock.stop_cause())
    assert clock.step_s == 1.0
    timing = TrialTiming(steps=100, step_s=clock.step_s, setup_s=11.0, save_s=2.0)
    assert timing.training_s == 113.0


def test_the_first_arm_pays_for_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of a worker's process is counted once, in its CPU seconds."""
    timing = TrialTiming(step_s=1.0, start_s=3.0)
    monkeypatch.setattr(step_timing, "timing_or_problem", lambda *_: timing)
    monkeypatch.setattr(step_timing.time, "process_time", lambda: 8.0)
    found = step_timing.timings([NO_ANSWERS, NO_ANSWERS], 1, print)
    assert [each.start_s for each in found] == [11.0, 3.0]


@pytest.mark.slow
def test_timed_steps_are_those_of_the_trial(rows_file: Path, tiny_base: Path) -> None:
    """The rows, the steps and the looks are exact, and nothing but the timing is left."""
    names = (f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none")
    schedule = ("training.max_steps=30", "training.eval_steps=10", "training.logging_steps=1")
    found = time_trial(make_settings(*names, *schedule).trial)
    assert found.problem is None
    assert (found.steps, found.looks) == (30, 3)
    assert sum(found.rows.values()) == 40
    assert found.training_s is not None
    assert found.training_s > 30 * (found.step_s or 0)


def test_the_time_counts_the_mean_of_the_searched_epochs() -> None:
    """Few rows: one to five epochs, so a trial has 30 steps of 2 s where the timed one has 10."""
    text = _shown(_plan("space=real", "training=real"))
    assert "epochs:     up to 5 epochs, because there are fewer than 2,000 training rows" in text
    assert "lora 18 × 80.0 s; full 15 × 80.0 s (from a few timed steps" in text
    assert "largest point, at the mean number of epochs)" in text
    fixed = _shown(_plan("space=real", "training=real", "training.num_train_epochs=1"))
    assert "epochs" not in fixed.partition("arm lora:")[0]


def test_what_a_stored_study_keeps_is_shown(tmp_path: Path) -> None:
    """A resumed study goes on with its own sampler, so the forecast names no other one."""
    words = ["workers.engine=inline", "workers.fake.step_seconds=0", f"output_dir={tmp_path}"]
    run_study(_plan("workers=fake", "tracking=none", *words, "sampler=random", "finalists=none"))
    text = _shown(_plan("workers=fake", "tracking=none", *words, "finalists=none"))
    assert "arm lora keeps sampler=random, with which it was started" in text
    assert "arm lora: 12 trials by random" in text


def test_time_comes_from_the_studys_earlier_trials(tmp_path: Path) -> None:
    """Ten trials and six seeds of 10 s, four trials and three seeds of 30 s, by two workers: 185 s."""
    folder = StudyFolder(tmp_path / "lr_rank_sweep")
    full_costs = {**LORA_COSTS, "cost/seconds": 30.0}
    results = make_results(
        make_arm("lora", [make_trial("lora", n, "finished", 4.0, LORA_COSTS) for n in range(2)]),
        make_arm("full", [make_trial("full", 0, "finished", 4.0, full_costs)]),
    )
    write_json(folder.results, to_document(results))
    plan = _plan(f"output_dir={tmp_path}", "hydra.sweeper.n_jobs=2")
    assert "about 3.1 min with 2 workers" in _shown(plan)
    only = make_results(results.arms[0])
    assert "cannot be known before the first finished trial of arm full" in forecast(
        plan, only, planned_workers(plan)
    )


def test_impossible_points_are_named_and_not_estimated() -> None:
    """A point that the settings refuse has its reason in the table, and the others keep their sizes."""
    arm = _plan().arms[0]
    found = draft(arm)
    broken = type(found)(found.points[:2], found.settings[1:2], ("adapter.r=0: too small", None))
    sheet = points_sheet(broken, _estimate(broken.settings))
    assert sheet.rows[0][-3:] == ("–", "–", "adapter.r=0: too small")
    assert sheet.rows[1][-3:] == (f"{10 * broken.settings[0].adapter.r:,}", "1,024 MiB", "")  # type: ignore[union-attr]


def test_disk_says_what_is_missing() -> None:
    """More artifacts than free space is said loudly; an unknown size stays unknown."""
    settings = make_settings()
    assert "NOT ENOUGH" in disk(settings, [1e12])
    assert "NOT ENOUGH" not in disk(settings, [1.0])
    assert "unknown" in disk(settings, [1.0, None])


def test_the_command_to_run_it_has_no_dry_run() -> None:
    """What is printed can be pasted."""
    assert without_dry_run("+experiment=e dry_run=true seed=1 -m") == "+experiment=e seed=1 -m"


def test_footprint_counts_what_training_counts() -> None:
    """1,115,264 weights in the embedded base; r=8 on all linear layers adds 81,920, as trials found."""
    found = footprint(make_settings("adapter.r=8", "adapter.target_modules=all-linear").trial)
    assert (found.trainable, found.total) == (81_920, 1_115_264 + 81_920)
    assert found.artifact_mib == pytest.approx(81_920 * 4 / 2**20)
    full = footprint(make_settings("adapter=none", "quantization=none").trial)
    assert full.trainable == full.total == 1_115_264


def test_footprint_of_nothing_says_why() -> None:
    """A model that cannot be had is a finding, not a stack trace."""
    document = make_settings("model.base_model=/no/such/folder").trial.model_dump(mode="json")
    found = footprint_or_problem(document)
    assert found.trainable is None
    assert "neither a local folder nor a hub id" in (found.problem or "")


def test_one_trial_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Without -m: the data, the size, the time, the disk and the settings."""
    show_single(single(["dry_run=true"]), Console(width=120), _estimate, _time)
    text = capsys.readouterr().out
    assert "80 of 1,000 parameters trained (8 %), memory about 1,024 MiB" in text
    assert "2.0 MiB of artifacts" in text
    # 15 s of loading, 5 s of judging the base, and the training
    assert "time:       about 60.0 s" in text


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("dry_run=true",), (*STUDY, "-m")], ids=["single", "study"])
def test_nothing_is_left_behind(
    program: Program, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """No folder, no database, no run: the command only prints."""
    result = program(*arguments)
    assert result.returncode == 0, result.stderr
    assert "dry run of" in result.stdout
    assert "parameters trained" in result.stdout or "1,115,264" in result.stdout
    assert not list(tmp_path.iterdir())
