"""Studies and nights of earlier versions are read, continued and built upon by this one."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from optuna import load_study
from typer.testing import CliRunner

from sweeper.cli.verbs import app
from sweeper.commands.run_study import run_study
from sweeper.core.paths import NightsFolder, StudyFolder, read_json
from sweeper.nightly.night_record import NightRecord, read_record
from sweeper.nightly.night_run import run_night
from sweeper.reporting.results import ArmResult, StudyResults, load_results
from sweeper.search.study import ORDERED
from sweeper.search.study_plan import studies
from sweeper.tracking.registry import ModelRegistry
from tests.past.judge import judge
from tests.past.past import FAKE, FINISHED, FIRST_NIGHT, MODEL, SET, SMALL, UNFINISHED, WHOLE

Say = Callable[..., str]


@pytest.fixture
def say(past: Path) -> Say:
    """What a verb prints, given its words."""

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def _run(*overrides: str) -> StudyResults:
    (plan,) = studies([*overrides, "workers.fake.step_seconds=0.0"])
    return run_study(plan)


def _arm(results: StudyResults, name: str = "lora") -> ArmResult:
    return next(arm for arm in results.arms if arm.name == name)


def _outcomes(name: str) -> dict[str, str]:
    """The outcome of every trial of a study, as its folder has it."""
    found = Path("outputs", name).glob("*/trial_*/outcome.json")
    return {str(path): path.read_text(encoding="utf-8") for path in found}


def test_a_killed_study_is_resumed(past: Path) -> None:
    """Ended trials stay, the killed one continues its checkpoint, and the queued point is tried."""
    before = _outcomes("unfinished")
    spool = Path("outputs/unfinished/lora/trial_0009/metrics.jsonl")
    measured = spool.read_text(encoding="utf-8").splitlines()
    results = _run(*UNFINISHED, *WHOLE, "tracking=none")
    lora = _arm(results)
    causes = {trial.number: trial.outcome.cause for trial in lora.trials}
    assert (causes[1], causes[3], causes[8], causes[9]) == (
        "oom",
        "diverged",
        "cancelled",
        "finished",
    )
    assert {"pruned", "finished"} <= set(causes.values())
    assert (lora.tried, _arm(results, "full").tried) == (13, 4)  # steering.json has added one
    after = _outcomes("unfinished")
    assert {path: after[path] for path in before} == before
    assert spool.read_text(encoding="utf-8").splitlines()[0] == measured[0]
    assert 16 in {trial.params["adapter.r"] for trial in lora.trials if trial.number > 9}
    assert all(arm.final is not None for arm in results.arms)


def test_a_finished_study_is_answered_again_without_training(past: Path) -> None:
    """The same command trains nothing and gives the values that were stored."""
    before = read_json(StudyFolder(Path("outputs/finished")).results)
    outcomes = _outcomes("finished")
    _run(*FINISHED)
    after = read_json(StudyFolder(Path("outputs/finished")).results)
    assert _outcomes("finished") == outcomes
    assert _values(after) == _values(before)
    for now, then in zip(after["verdict"]["sides"], before["verdict"]["sides"], strict=True):
        same = ("arm", "label", "point", "value", "base_value", "trials", "trainable")
        assert {key: now[key] for key in same} == {key: then[key] for key in same}


def _values(document: dict[str, Any]) -> dict[str, list[tuple[int, float | None]]]:
    """Each arm's trials, the best first, and their values to the last digit."""
    arms = document["arms"].items()
    return {name: [(t["number"], t["best_value"]) for t in arm["trials"]] for name, arm in arms}


def _shared(new: Any, old: Any, ignored: tuple[str, ...]) -> Any:
    """What a document says under the keys that an earlier one has, too."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(new[key], old[key], ignored) for key in old if key not in ignored}
    if isinstance(new, list) and isinstance(old, list):
        return [_shared(each, old[at], ignored) for at, each in enumerate(new)]
    return new


def test_a_finished_study_is_extended(past: Path) -> None:
    """A larger total adds trials to those that were there."""
    before = _outcomes("finished")
    more = ("hydra.sweeper.n_trials=10", "hydra.sweeper.arms.full.n_trials=3")
    results = _run(*FINISHED, *more, "finalists=none", "tracking=none")
    assert (_arm(results).tried, _arm(results, "full").tried) == (10, 3)
    assert before.items() <= _outcomes("finished").items()


DRAWS = (
    (1.7165e-3, 8, 4, "attention", 0.015914),
    (5.4271e-4, 8, 4, "mlp", 0.079924),
    (1.7205e-2, 2, 4, "mlp", 0.090056),
    (5.3903e-3, 8, 4, "attention", 0.067036),
)
"""Rate, rank, ratio, targets and warm-up of the trials that follow the stored ones."""


def test_a_stored_study_keeps_its_draws(past: Path) -> None:
    """The next points are those that the version before sampler=lora drew."""
    more = ("hydra.sweeper.n_trials=12", "~hydra.sweeper.arms.full", "finalists=none")
    lora = _arm(_run(*FINISHED, *more, "tracking=none"))
    later = sorted((trial for trial in lora.trials if trial.number >= 8), key=lambda t: t.number)
    keys = (
        *("training.learning_rate", "adapter.r", "adapter.alpha_over_r"),
        *("adapter.target_modules", "training.warmup_ratio"),
    )
    found = [tuple(trial.params[key] for key in keys) for trial in later]
    for draw, expected in zip(found, DRAWS, strict=True):
        assert draw[1:4] == expected[1:4]
        assert (draw[0], draw[4]) == pytest.approx((expected[0], expected[4]), rel=1e-3)
    storage = "sqlite:///outputs/finished/study.db"
    assert load_study(study_name="finished/lora", storage=storage).user_attrs[ORDERED] is False


@pytest.mark.parametrize("name", ["unfinished", "finished"])
def test_every_format_reports_the_past(say: Say, name: str) -> None:
    """Six formats show each trial's value as it was stored."""
    stored = read_json(StudyFolder(Path("outputs", name)).results)
    (document,) = json.loads(say("report", name, "--format", "json"))
    assert _values(document) == _values(stored)
    # The sentences may be worded better since, the figures may not change. What an arm cost is one:
    # it counts the finalists since.
    ignored = ("words", "device_seconds")
    assert _shared(document["verdict"], stored["verdict"], ignored) == _shared(
        stored["verdict"], stored["verdict"], ignored
    )
    rows = list(csv.DictReader(io.StringIO(say("report", name, "--format", "csv"))))
    trials = [trial for arm in stored["arms"].values() for trial in arm["trials"]]
    assert [int(row["trial"]) for row in rows] == [trial["number"] for trial in trials]
    text = Path("outputs", name, "report.md").read_text(encoding="utf-8")
    # Ranks with other target modules are compared no more.
    text = re.sub(r"## \w+: what each rank brings.*?(?=\n## )", "", text, flags=re.DOTALL)
    figures = re.findall(r"\d+\.\d{4}", text)
    assert len(figures) > 5
    assert set(figures) <= set(re.findall(r"\d+\.\d{4}", say("report", name, "--format", "md")))
    assert f"{trials[0]['best_value']:.4f}" in say("report", name)
    assert say("report", name, "--format", "svg").startswith("<svg")
    page = Path(say("report", name, "--format", "html").strip())
    assert f"{trials[0]['best_value']:.4f}" in page.read_text(encoding="utf-8")


def test_a_finished_study_is_forked(past: Path) -> None:
    """All ten counted trials fit the same question, and their folders are found."""
    forked = ("hydra.sweeper.study_name=forked", "hydra.sweeper.fork_of=finished")
    results = _run(*FAKE, *SMALL, *forked, "tracking=none")
    before = load_results("finished", Path("outputs"))
    assert [(t.number, t.value) for t in _arm(results).trials] == [
        (t.number, t.value) for t in _arm(before).trials
    ]
    assert (
        Path("outputs/forked/lora/trial_0007").resolve()
        == past / "outputs/finished/lora/trial_0007"
    )


def test_a_finished_study_warms_another(past: Path) -> None:
    """The winner's point of the past is the first that a new study tries."""
    warm = ("hydra.sweeper.study_name=warm", "hydra.sweeper.warm_start=[finished]")
    short = ("hydra.sweeper.n_trials=1", "~hydra.sweeper.arms.full", "finalists=none")
    (first,) = _arm(_run(*FAKE, *warm, *short, "tracking=none")).trials
    best = _arm(load_results("finished", Path("outputs"))).best
    assert best is not None
    assert first.params == best.params


def test_the_winner_of_the_past_is_used(say: Say) -> None:
    """`best` names its folder, checks its weights and writes its experiment."""
    best = _arm(load_results("finished", Path("outputs"))).best
    assert best is not None
    folder = f"outputs/finished/lora/trial_{best.number:04d}"
    assert say("best", "finished", "--adapter").strip() == f"{folder}/adapter"
    assert folder in say("best", "finished")
    text = say("best", "finished", "--yaml")
    assert f"learning_rate: {best.params['training.learning_rate']}" in text


def test_where_studies_of_the_past_stand(say: Say) -> None:
    """A study whose driver was killed is told from one that came to its end."""
    killed = json.loads(say("study", "show", "unfinished", "--json"))
    assert (killed["state"], killed["arms"][0]["done"]) == ("killed", 8)
    assert json.loads(say("study", "show", "finished", "--json"))["state"] == "finished"
    listed = say("study", "list")
    assert all(
        name in listed for name in ("unfinished", "finished", "mine_lr_rank_sweep_2026-05-01")
    )


def test_what_mlflow_missed_in_the_past_is_recorded(say: Say) -> None:
    """All runs of the killed study are shipped from its folder; the finished one lacks nothing."""
    store = "tracking.uri=sqlite:///mlruns/mlflow.db"
    assert "final states of 13 runs" in say("sync", "unfinished", store)
    assert "MLflow has everything" in say("sync", "finished")


def test_a_night_continues_the_one_before(past: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next night adds two trials to the study, and its best does not unseat the champion."""
    registry = ModelRegistry(None, past / "mlruns")
    champion = registry.champion(MODEL)
    assert champion is not None
    assert champion.folder == past / "outputs/mine_lr_rank_sweep_2026-05-01/lora/trial_0002"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeper.tracking.registry._require_adapter", lambda *_: None)
        result = run_night(SET, clock=lambda: FIRST_NIGHT + timedelta(days=1), judge=judge)
    entry = _night(1).entries[MODEL]
    assert result == "no change"
    assert entry.decided is not None
    assert (entry.decided.choice, entry.decided.reason) == ("continue", "nothing changed")
    assert (entry.decided.study_name, sum(entry.causes.values())) == (
        "mine_lr_rank_sweep_2026-05-01",
        2,
    )
    assert registry.champion(MODEL) == champion


def _night(number: int) -> NightRecord:
    day = (FIRST_NIGHT + timedelta(days=number)).date().isoformat()
    record = read_record(NightsFolder.under(Path("outputs")).night(SET, day))
    assert record is not None
    return record
