"""A study's storage in the hands of Optuna's own tools: its API, and optuna-dashboard over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna.trial import TrialState
from optuna_dashboard import wsgi

from sweeper.commands.run_study import run_study
from sweeper.core.paths import StudyFolder, read_json
from sweeper.search.study_plan import studies

OVERRIDES = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "tracking=none"),
    *("workers.fake.step_seconds=0", "hydra.sweeper.n_trials=6", "++workers.fake.plan={1: oom}"),
)


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study whose trainer only pretends, one of its trials out of memory."""
    place = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (plan,) = studies(OVERRIDES)
        run_study(plan)
    return StudyFolder(place / "outputs" / "lr_rank_sweep")


@pytest.fixture(scope="module")
def storage(folder: StudyFolder) -> str:
    """The URL that a person gives to Optuna's tools."""
    return f"sqlite:///{folder.database}"


@pytest.fixture(scope="module")
def dashboard(storage: str) -> Iterator[str]:
    """optuna-dashboard on localhost, as its command serves it."""
    with make_server("127.0.0.1", 0, wsgi(storage), handler_class=_Silent) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _ask(url: str) -> Any:
    with urlopen(url, timeout=30) as answer:
        return json.loads(answer.read())


def _recorded(folder: StudyFolder, arm: str) -> dict[int, dict[str, Any]]:
    """The trials of results.json by number."""
    trials = read_json(folder.results)["arms"][arm]["trials"]
    return {trial["number"]: trial for trial in trials}


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_load_study_gives_the_same_trials(folder: StudyFolder, storage: str, arm: str) -> None:
    """Numbers, parameters, values and states are those of results.json; so is the best trial."""
    study = optuna.load_study(study_name=f"lr_rank_sweep/{arm}", storage=storage)
    recorded = _recorded(folder, arm)
    assert {trial.number for trial in study.trials} == set(recorded)
    for trial in study.trials:
        written = recorded[trial.number]
        assert trial.user_attrs["point"] == written["params"]
        assert trial.user_attrs["cause"] == written["cause"]
        if written["cause"] == "finished":
            assert (trial.state, trial.value) == (TrialState.COMPLETE, written["best_value"])
    best = min(
        (trial for trial in recorded.values() if trial["cause"] == "finished"),
        key=lambda trial: trial["best_value"],
    )
    assert study.best_trial.number == best["number"]
    assert len(study.trials_dataframe()) == len(recorded)


def test_the_dashboard_serves_the_studies_trials(folder: StudyFolder, dashboard: str) -> None:
    """Over HTTP: a study an arm, each with the trials, values and learning rates of results.json."""
    summaries = {
        each["study_name"]: each for each in _ask(f"{dashboard}/api/studies")["study_summaries"]
    }
    assert set(summaries) == {"lr_rank_sweep/lora", "lr_rank_sweep/full"}
    identity = summaries["lr_rank_sweep/lora"]["study_id"]
    found = _ask(f"{dashboard}/api/studies/{identity}?after=0")["trials"]
    recorded = _recorded(folder, "lora")
    assert {trial["number"] for trial in found} == set(recorded)
    for trial in found:
        written = recorded[trial["number"]]
        if written["cause"] == "finished":
            assert trial["state"] == "Complete"
            assert trial["values"] == [written["best_value"]]
        params = {each["name"]: float(each["param_internal_value"]) for each in trial["params"]}
        rate = "training.learning_rate"
        assert params[rate] == pytest.approx(written["params"][rate])


def test_the_dashboards_page_opens(dashboard: str) -> None:
    """The page that a browser gets for a study whose name has a slash."""
    with urlopen(
        f"{dashboard}/dashboard/studies/1#{quote('lr_rank_sweep/lora')}", timeout=30
    ) as page:
        assert page.status == 200
        assert b"<html" in page.read()
