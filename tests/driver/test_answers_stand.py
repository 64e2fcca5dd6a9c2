"""A finished study's answer stands, whatever start under its name ends early."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from mlflow import MlflowClient
from sqlalchemy.exc import OperationalError

from sweeper.commands import study_conclusion
from sweeper.commands.run_study import run_study
from sweeper.commands.study_conclusion import StudyConclusion
from sweeper.core.errors import StudyError, StudyMismatch, WorkerError
from sweeper.core.paths import StudyFolder
from sweeper.driver import results_writer, study_run
from sweeper.driver.arm_probe import ProbeJob
from sweeper.driver.arm_search import ArmSearch
from sweeper.driver.budget import ArmBudget
from sweeper.driver.command_handler import CommandHandler
from sweeper.driver.finalist_runs import FinalistRuns
from sweeper.driver.results_writer import ResultsWriter
from sweeper.reporting.results import StudyResults
from sweeper.search.study_plan import studies
from sweeper.workers.fake_runner import FakeRunner

NAME = "mine"
FAKE = (
    *("+experiment=lr_rank_sweep", f"hydra.sweeper.study_name={NAME}", "workers=fake"),
    *("workers.engine=inline", "workers.fake.step_seconds=0.0", "pruner=none"),
    "hydra.sweeper.priors=[]",
    *("hydra.sweeper.n_trials=3", "hydra.sweeper.arms.full.n_trials=3"),
    *("hydra.sweeper.finalists.seeds=2", "hydra.sweeper.finalists.fresh_seeds=1"),
    *("hydra.sweeper.fairness.min_finished=1", "hydra.sweeper.fairness.tolerance=0.9"),
    # wide enough for the best rate of three to lie in its middle
    "training.learning_rate=tag(log,interval(3e-5,3e-1))",
)
FOLDER = StudyFolder(Path("outputs", NAME))
Patch = Callable[[pytest.MonkeyPatch], None]


def _run(*overrides: str) -> StudyResults:
    (plan,) = studies([*FAKE, *overrides])
    return run_study(plan)


def _files() -> dict[str, bytes]:
    """The study's answer in all its forms, by path."""
    found = [path for answer in FOLDER.answers for path in (answer, *answer.glob("*"))]
    return {str(path): path.read_bytes() for path in found if path.is_file()}


def _parent() -> tuple[str, dict[str, float], dict[str, str]]:
    """The status, metrics and tags of the study's run in MLflow."""
    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("lr_rank_sweep")
    runs = client.search_runs([experiment.experiment_id], f"run_name = '{NAME}'")
    (run,) = runs
    return run.info.status, run.data.metrics, run.data.tags


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A folder with an empty store of MLflow."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(empty_store, folder / "mlflow.db")
        yield folder


@pytest.fixture
def finished(home: Path) -> None:
    """A finished study, which is finished again if an earlier test has damaged its answer."""
    if not FOLDER.results.exists() or _parent()[0] != "FINISHED" or not _measures()[1]:
        _run("tracking.uri=sqlite:///mlflow.db")
    assert _parent()[0] == "FINISHED"
    assert all(_measures())


def _stops(target: Any, name: str, error: BaseException) -> Patch:
    """An error, or Ctrl-C, at the moment at which a function is called."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return lambda patch: patch.setattr(target, name, fail)


def _other_base(patch: pytest.MonkeyPatch) -> None:
    """A base model whose weights were replaced under the same name."""
    probe = FakeRunner.probe

    def other(self: FakeRunner, *words: Any) -> Any:
        return probe(self, *words).model_copy(update={"base_digest": "other"})

    patch.setattr(FakeRunner, "probe", other)


def _nothing(patch: pytest.MonkeyPatch) -> None:
    """No fault: the overrides alone are wrong."""


FULL = OSError(errno.ENOSPC, "No space left on device")
AWAY = OperationalError("SELECT 1", {}, Exception("the database is away"))
MORE = "hydra.sweeper.n_trials=4"
MOMENTS: dict[str, tuple[Any, str]] = {
    "worker start": (study_run, "open_engine"),
    "commands": (CommandHandler, "catch_up"),
    "probe": (ProbeJob, "send"),
    "arm's study": (study_run, "open_study"),
    "first points": (study_run, "fill_study"),
    "search": (ArmSearch, "begin"),
    "finalists": (FinalistRuns, "run"),
    "collecting": (ResultsWriter, "collect"),
    "results.json": (results_writer, "write_json"),
    "report.md": (results_writer, "write_atomic"),
    "printing": (StudyConclusion, "_show"),
    "report.html": (study_conclusion, "write_page"),
}
STARTS: dict[str, tuple[tuple[str, ...], Patch, type[BaseException]]] = {
    "another setting": (("training.max_steps=16",), _nothing, StudyMismatch),
    "another space": (("adapter.r=2,4",), _nothing, StudyMismatch),
    "another setting of the second arm": (
        ('hydra.sweeper.arms.full.overrides=["adapter=none","quantization=none","seed=9"]',),
        _nothing,
        StudyMismatch,
    ),
    "another data file": (("data.train=other.jsonl",), _nothing, StudyMismatch),
    "another base": ((), _other_base, StudyMismatch),
    "no worker": ((), _stops(study_run, "open_engine", WorkerError("no device")), WorkerError),
    "the base is away": ((), _stops(FakeRunner, "probe", StudyError("no base")), StudyError),
    "the database is away": ((), _stops(study_run, "open_study", AWAY), OperationalError),
    "code error": (
        (MORE, "++workers.fake.plan={3:error,4:error,5:error,6:error}"),
        _nothing,
        StudyError,
    ),
    **{
        f"Ctrl-C at {moment}": ((), _stops(*where, KeyboardInterrupt()), KeyboardInterrupt)
        for moment, where in MOMENTS.items()
    },
    **{
        f"Ctrl-C of more trials at {moment}": (
            (MORE,),
            _stops(*MOMENTS[moment], KeyboardInterrupt()),
            KeyboardInterrupt,
        )
        for moment in ("first points", "search", "finalists")
    },
    **{
        f"full disk at {moment}": ((), _stops(*MOMENTS[moment], FULL), OSError)
        for moment in ("results.json", "report.md", "report.html")
    },
    "database away at the end": ((), _stops(ResultsWriter, "collect", AWAY), OperationalError),
}


REWRITTEN = {
    *("Ctrl-C at report.md", "Ctrl-C at printing", "Ctrl-C at report.html"),
    *("full disk at results.json", "full disk at report.md", "full disk at report.html"),
}
"""Starts whose whole answer, equal to the stored one, was being written when they ended."""


def _measures() -> list[int]:
    """Trials, finalists and losses on the test split, of every arm of results.json."""
    arms = json.loads(FOLDER.results.read_text(encoding="utf-8"))["arms"].values()
    ends = [arm["final"] or {"finalists": [], "test_losses": {}} for arm in arms]
    return [
        *(len(arm["trials"]) for arm in arms),
        *(len(end[part]) for end in ends for part in ("finalists", "test_losses")),
    ]


FAST_STARTS = ("another setting", "no worker", "the database is away", "code error")


@pytest.mark.parametrize(
    "start",
    [
        *FAST_STARTS,
        *(
            pytest.param(start, marks=pytest.mark.slow)
            for start in STARTS
            if start not in FAST_STARTS
        ),
    ],
)
def test_a_start_that_ends_early_leaves_the_answer_as_it_was(
    finished: None, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Files and MLflow's run are the same, or the answer has all that was there, and more."""
    overrides, fault, error = STARTS[start]
    files, parent, before = _files(), _parent(), _measures()
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(error):
            _run("tracking.uri=sqlite:///mlflow.db", *overrides)
    pairs = list(zip(_measures(), before, strict=True))
    assert all(now >= then for now, then in pairs)
    status, metrics, tags = _parent()
    assert status == "FINISHED"
    assert metrics.keys() >= parent[1].keys()
    if start not in REWRITTEN and all(now == then for now, then in pairs):
        assert _files() == files
        assert (metrics, tags) == parent[1:]


def test_a_budget_that_ends_before_the_finalists_leaves_the_answer(
    finished: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is used up before lost seeds are trained again: exit 0, and the richer answer stays."""
    tracking = "tracking.uri=sqlite:///mlflow.db"
    files, parent = _files(), _parent()
    shutil.rmtree(FOLDER.finalists("lora"))
    with monkeypatch.context() as patch:
        patch.setattr(ArmBudget, "refusal", lambda *_: "the time is used up")
        _run(tracking)
    assert _files() == files
    assert _parent() == parent
    _run(tracking)
    assert all(_measures())
