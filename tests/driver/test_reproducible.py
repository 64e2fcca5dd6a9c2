"""The same seed and number of workers give the same trials, whatever comes first."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import optuna
import pytest

from sweeper.commands.run_study import run_study
from sweeper.commands.study_conclusion import StudyConclusion
from sweeper.driver import study_run
from sweeper.driver.dispatcher import Dispatcher
from sweeper.search.record_prefix import turn_of
from sweeper.search.study_plan import studies
from sweeper.workers.protocol import EvaluatedEvent, WorkerEvent
from tests.driver.threaded import StepSeconds, opener

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "tracking=none", "finalists=none"),
    "++workers.fake.steps=10",
    *("hydra.sweeper.pruner.n_startup_trials=2", "hydra.sweeper.pruner.rungs=[400,600]"),
)
ONLY_LORA = "~hydra.sweeper.arms.full"
Row = tuple[int, object, str, object, object]


def _uneven(seed: int, step_s: float = 0.002) -> StepSeconds:
    """Trials of one seed differ up to tenfold in speed, those of another seed otherwise."""
    return lambda key: step_s * 10 ** random.Random(f"{seed}/{key}").random()


def _table(tmp_path: Path, arm: str = "lora") -> list[Row]:
    """Return what became of each place of an arm: its point, cause, value and steps."""
    storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
    trials = optuna.load_study(study_name=f"lr_rank_sweep/{arm}", storage=storage).trials
    rows = [
        (
            turn_of(trial).place,
            trial.user_attrs.get("point", trial.params),  # a duplicate has none
            trial.user_attrs["cause"],
            trial.values,
            trial.user_attrs["outcome"]["steps"],
        )
        for trial in trials
        if trial.user_attrs["cause"] != "cancelled"
    ]
    return sorted(rows, key=lambda row: row[0])


def _run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step_seconds: StepSeconds,
    *overrides: str,
    after: Mapping[str, str] = MappingProxyType({}),
) -> None:
    monkeypatch.setattr(study_run, "open_engine", opener(step_seconds, after=after))
    monkeypatch.setattr(
        StudyConclusion, "_write", lambda self, *results: None
    )  # no page is read here
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    run_study(plan)


def _same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timings: Sequence[StepSeconds], *overrides: str
) -> list[Row]:
    """Run one study with several timings, and return the table that all of them have."""
    tables = []
    for number, timing in enumerate(timings):
        _run(tmp_path / str(number), monkeypatch, timing, ONLY_LORA, *overrides)
        tables.append(_table(tmp_path / str(number)))
    assert all(table == tables[0] for table in tables[1:])
    return tables[0]


def test_two_timings_of_one_study_give_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points, prunings, values and steps follow from the record, not from what arrives first.

    In the second run the full arm begins before the last LoRA trial ends.
    """
    wanted = ("n_jobs=2", "n_trials=8", "arms.full.n_trials=2")
    keys = [f"hydra.sweeper.{each}" for each in wanted]
    _run(tmp_path / "even", monkeypatch, lambda key: 0.0, *keys)
    _run(tmp_path / "uneven", monkeypatch, _uneven(1), *keys, after={"lora/0007": "full/0000"})
    lora, full = ([_table(tmp_path / each, arm) for each in ("even", "uneven")]
                  for arm in ("lora", "full"))  # fmt: skip
    assert lora[0] == lora[1]
    assert full[0] == full[1]
    assert {row[2] for row in lora[0]} >= {"finished", "pruned"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("n_jobs=3", "n_trials=20", "sampler.name=gp"),
        ("n_jobs=4", "n_trials=24", "sampler.name=lora"),
        ("n_jobs=3", "n_trials=24", "pruner.name=percentile", "pruner.percentile=30.0"),
        ("n_jobs=2", "n_trials=16", "pruner.audit_fraction=0.5"),
        ("n_jobs=4", "n_trials=40", "budget.plateau={trials: 8, min_improvement: 0.01}"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_three_timings_of_every_kind_of_search_give_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """With every sampler and pruner, audits, and a search that ends at a plateau."""
    timings = (lambda key: 0.0, _uneven(1), _uneven(2))
    keys = [f"++hydra.sweeper.{each}" for each in overrides]
    assert len(_same_table(tmp_path, monkeypatch, timings, *keys)) > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("++workers.fake.plan={1: oom, 4: diverge, 5: oom}",),
        ("training.learning_rate=1e-3,3e-3,1e-2", "adapter.r=2,4,8"),
        ("pruner=successive_halving", "hydra.sweeper.pruner.rungs=[400,800]"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_failures_and_duplicates_follow_from_the_record_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """Infeasible points, points that are drawn twice, and rungs that trials pass while others run."""
    timings = (lambda key: 0.0, _uneven(1), _uneven(2))
    wanted = ("hydra.sweeper.n_jobs=3", "hydra.sweeper.n_trials=12")
    assert len(_same_table(tmp_path, monkeypatch, timings, *wanted, *overrides)) >= 12


@pytest.mark.slow
def test_arms_that_overlap_have_the_tables_of_arms_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA's last trial lasts until the whole grid, or one full trial, or nothing has been tried."""
    tables = []
    for number, after in enumerate(({}, {"lora/0005": "full/0006"}, {"lora/0004": "full/0000"})):
        folder = tmp_path / str(number)
        keys = ("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6", "++workers.fake.steps=200")
        # no warm-up of the full arm's own, so that its last trial has that of LoRA's winner
        warmup = "training.warmup_ratio=interval(0.05, 0.1)"
        _run(folder, monkeypatch, lambda key: 0.0, *keys, warmup, after=after)
        tables.append([_table(folder, arm) for arm in ("lora", "full")])
    assert tables[0] == tables[1] == tables[2]
    assert [len(table) for table in tables[0]] == [6, 8]


class Disturbance:
    """A pause or Ctrl-C that arrives at the same moment as the look of a trial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int, *, ctrl_c: bool) -> None:
        """Disturb the driver at each look whose number `every` divides."""
        self.happened = 0
        self._looks = 0
        inner = Dispatcher._route

        def route(dispatcher: Dispatcher, event: WorkerEvent) -> None:
            looks = isinstance(event, EvaluatedEvent) and dispatcher.mode == "running"
            self._looks += looks
            if not looks or self._looks % every:
                inner(dispatcher, event)
            elif ctrl_c:
                self._interrupt(dispatcher, event)
            else:
                self.happened += 1
                dispatcher.pause()
                inner(dispatcher, event)
                dispatcher.resume()

        monkeypatch.setattr(Dispatcher, "_route", route)

    def _interrupt(self, dispatcher: Dispatcher, event: EvaluatedEvent) -> NoReturn:
        self.happened += 1
        worker = dispatcher._jobs.running[event.job].worker
        dispatcher._pool.engine._arrived.put((worker, event.model_dump_json()))  # type: ignore[attr-defined]
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("ctrl_c", [False, True], ids=["pause", "ctrl_c"])
def test_a_trial_that_is_stopped_at_a_look_is_pruned_as_if_it_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: bool
) -> None:
    """Disturbed at every look, or interrupted at each fifth one and started again: the same table."""
    keys = (ONLY_LORA, "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=8")
    _run(tmp_path / "undisturbed", monkeypatch, lambda key: 0.0, *keys)
    disturbance = Disturbance(monkeypatch, 5 if ctrl_c else 1, ctrl_c=ctrl_c)
    for _ in range(50):
        with suppress(KeyboardInterrupt):
            _run(tmp_path / "disturbed", monkeypatch, lambda key: 0.0, *keys)
            break
    table = _table(tmp_path / "disturbed")
    assert disturbance.happened > 3
    assert table == _table(tmp_path / "undisturbed")
    assert "pruned" in {row[2] for row in table}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "lora"])
def test_a_killed_study_has_the_trials_of_an_undisturbed_one(tmp_path: Path, sampler: str) -> None:
    """Killed up to six times: each place of both arms has the point, the end and the value it had."""
    command = [sys.executable, "-m", "sweeper", *FAKE, "hydra.sweeper.n_jobs=2", "-m"]
    command += ["++workers.fake.step_seconds=0.05", "hydra.sweeper.n_trials=12"]
    command.append(f"sampler={sampler}")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    subprocess.run([*command, f"output_dir={undisturbed}"], check=True, timeout=300)
    command.append(f"output_dir={disturbed}")
    database = disturbed / "lr_rank_sweep" / "study.db"
    for seconds in (2.0, 1.0, 2.5, 1.5, 2.0, 1.5):
        written = database.stat().st_mtime_ns if database.exists() else 0
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        # A study that has ended before its last kill writes nothing more
        while process.poll() is None and not (
            database.exists() and database.stat().st_mtime_ns > written
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait(60)
    subprocess.run(command, check=True, timeout=300)
    for arm in ("lora", "full"):
        assert _table(disturbed, arm) == _table(undisturbed, arm)
