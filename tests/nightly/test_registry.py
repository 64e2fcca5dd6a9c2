"""Champions in a real MLflow store, over nights whose trainer only pretends and whose judge is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from sweeper.core.errors import TrackingError
from sweeper.core.outcome import GateFigures
from sweeper.nightly.challenge import challenge
from sweeper.nightly.night_record import BestTrial, NightRecord
from sweeper.nightly.night_run import run_night
from sweeper.nightly.nightly_set import load_set
from sweeper.tracking.registry import ModelRegistry

FIRST = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
MODEL = "lr_rank_sweep"
FIXED = ["adapter.r=8", "adapter.alpha_over_r=2", "adapter.target_modules=attention"]
OVERRIDES = [
    *("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0"),
    *("~hydra.sweeper.arms.full", "training.warmup_ratio=0.0", "data.train=my.jsonl", *FIXED),
]


class Judge:
    """Losses that a test decides, on 100 examples of 10 tokens; remembers what it was asked."""

    def __init__(self, forgets: float = 0.1, **losses: float) -> None:
        self.losses = losses
        self.forgets = forgets
        self.asked: list[dict[str, Path]] = []

    def __call__(self, gate: str, trials: dict[str, Path]) -> GateFigures:
        self.asked.append(trials)
        hard = np.random.default_rng(0).normal(0, 1, 100)
        names = ["base", *trials]
        nll = {name: list(10 * self.losses[name] + hard) for name in names}
        forgotten = {"base": 0.0, "challenger": self.forgets, "champion": 0.1}
        general = {name: [10 * (3.6 + forgotten[name])] * 8 for name in names}
        return GateFigures(tokens=[10] * 100, nll=nll, general_tokens=[10] * 8, general=general)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A user's folder with a set that is tracked in its own mlruns/."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mlruns").mkdir()
    shutil.copy(empty_store, folder / "mlruns")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # the trainer that only pretends stores no weights
        patch.setattr("sweeper.tracking.registry._require_adapter", lambda *_: None)
        rows = ({"instruction": f"Add {i}.", "output": f"Added {i} to it."} for i in range(40))
        Path("my.jsonl").write_text(
            "".join(json.dumps({**row, "input": ""}) + "\n" for row in rows)
        )
        entry = {
            **{"experiment": "lr_rank_sweep", "overrides": OVERRIDES, "gate": "gate.jsonl"},
            **{"policy": "fresh", "n_trials": 2},
        }
        Path("conf/nightly").mkdir(parents=True)
        text = {"defaults": ["default", "_self_"], "experiments": [entry]}
        text["champion"] = {"margin": 0.01}
        Path("conf/nightly/mine.yaml").write_text(yaml.safe_dump(text))
        yield folder


def _night(number: int, judge: Judge) -> NightRecord:
    when = FIRST + timedelta(days=number)
    run_night("mine", clock=lambda: when, judge=judge)
    path = Path("outputs/nightly/mine") / when.date().isoformat() / "night.json"
    return NightRecord.model_validate_json(path.read_text())


def test_promotion_refusal_promotion_and_rollback(folder: Path) -> None:
    """Night 1 crowns the first, night 2 is refused with its evidence, night 3 wins; it is taken back."""
    registry = ModelRegistry(None, folder / "mlruns")
    first = _night(0, Judge(base=4.5, challenger=4.0))
    assert first.result == "new champion"
    crowned = registry.champion(MODEL)
    assert crowned is not None
    assert crowned.study == "mine_lr_rank_sweep_2026-05-01"
    refusing = Judge(base=4.5, challenger=3.995, champion=4.0)
    second = _night(1, refusing)
    decision = second.entries[MODEL].champion
    assert (second.result, decision and decision.verdict) == ("no change", "kept")
    assert refusing.asked[0]["champion"] == crowned.folder
    kept = registry.champion(MODEL)
    assert (kept and kept.number) == crowned.number
    assert decision is not None
    assert decision.evidence is not None
    assert decision.evidence.forgotten == pytest.approx(0.1)
    third = _night(2, Judge(base=4.5, challenger=3.8, champion=4.0))
    assert third.result == "new champion"
    now = registry.champion(MODEL)
    assert now is not None
    assert (now.number, now.previous) == ("2", "1")
    assert "-0.2000 nats against champion version 1" in now.tags["sweeper.reason"]
    text = Path("outputs/nightly/mine/2026-05-03/digest.md").read_text()
    assert "promoted" in text
    assert "the gate split has been evaluated 3 times" in text
    assert registry.rollback(MODEL).number == "1"
    back = registry.champion(MODEL)
    assert (back and back.number, back and back.folder) == ("1", crowned.folder)
    with pytest.raises(TrackingError, match="first champion"):
        registry.rollback(MODEL)
    _digests_are_recorded(folder)


def _digests_are_recorded(folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("nightly")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    names = {file.path for file in client.list_artifacts(runs[0].info.run_id)}
    assert {"digest.md", "digest.html"} <= names


def test_a_better_model_that_forgot_too_much_is_refused(folder: Path) -> None:
    """0.2 nats better on the gate, and 1.2 nats worse on general text, where the set allows 1."""
    registry = ModelRegistry(None, folder / "mlruns")
    before = registry.champion(MODEL)
    record = _night(4, Judge(forgets=1.2, base=4.5, challenger=3.8, champion=4.0))
    decision = record.entries[MODEL].champion
    assert decision is not None
    assert decision.verdict == "kept"
    assert decision.reason.startswith("Its forgetting of 1.2000 nats exceeds max_forgetting=1. ")
    after = registry.champion(MODEL)
    assert (after and after.number) == (before and before.number)
    text = Path("outputs/nightly/mine/2026-05-05/digest.md").read_text()
    assert "Forgetting +1.2000 nats" in text


def _winner(record: NightRecord) -> tuple[str, BestTrial]:
    entry = record.entries[MODEL]
    assert entry.decided is not None
    assert entry.best is not None
    return entry.decided.study_name, entry.best


def test_what_was_rolled_back_by_hand_is_not_promoted_again(folder: Path) -> None:
    """The best trial was taken back: the next night does not have it judged, and says which version."""
    registry = ModelRegistry(None, folder / "mlruns")
    losing = Judge(base=4.5, challenger=4.4, champion=4.0)
    (holder, old), (study, best) = (_winner(_night(number, losing)) for number in (5, 6))
    number = best.number
    before = registry.promote(MODEL, holder, f"lora/{old.number:04d}", {})
    taken_back = registry.promote(MODEL, study, f"lora/{number:04d}", {})
    registry.rollback(MODEL)
    loaded = load_set("mine")
    (wanted,) = loaded.settings.experiments
    judge = Judge(base=4.5, challenger=3.8, champion=4.0)
    plan, rules = loaded.plan(wanted, study), loaded.settings.champion
    decision = challenge(wanted, plan, best, rules, judge)
    assert decision is not None
    assert (decision.verdict, judge.asked) == ("undecided", [])
    assert f"rolled back by hand (version {taken_back.number})" in decision.reason
    assert f"sweeper champion promote {MODEL} {study} lora/{number:04d}" in decision.reason
    assert registry.champion(MODEL) == before


def test_unknown_models_and_runs_are_named(folder: Path) -> None:
    """Nothing to roll back, and no run to promote: one line each."""
    registry = ModelRegistry(None, folder / "mlruns")
    assert registry.champion("nobody") is None
    with pytest.raises(TrackingError, match="'nobody' has no champion"):
        registry.rollback("nobody")
    with pytest.raises(TrackingError, match="no run of trial lora/0099"):
        registry.promote("nobody", "mine", "lora/0099", {})


def test_server_that_is_away_ends_no_night(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the tracking URI: the night trains, and the digest says what is missing."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("sweeper.tracking.mlflow_tracker.CLOSE_SECONDS", 0.1)
    from sweeper.config import compose

    compose._composed_or_refused.cache_clear()  # the environment is read when it is composed
    record = _night(3, Judge())
    assert record.entries[MODEL].status == "done"
    text = Path("outputs/nightly/mine/2026-05-04/digest.md").read_text()
    assert "no decision on the champion: MLflow:" in text
    assert "the digest was not recorded: MLflow:" in text
