"""The verbs' exit codes and what they print."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from sweeper.cli.verbs import app
from sweeper.commands import retention
from sweeper.commands.retention import Removal
from sweeper.nightly import night_run

RUNNER = CliRunner()


@pytest.mark.parametrize(
    ("result", "code"),
    [(None, 0), ("no change", 0), ("failure", 1), ("new champion", 10), ("regression", 11)],
)
def test_exit_code_tells_how_the_night_ended(
    result: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to run and no change are 0; the others can be told apart."""
    monkeypatch.setattr(night_run, "run_night", lambda name, overrides: result)
    assert RUNNER.invoke(app, ["nightly", "default"]).exit_code == code


def test_dry_run_of_clean_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dry-run prints what would go and how much that is; without it, it goes."""
    loser = tmp_path / "outputs" / "mine" / "adapter"
    loser.mkdir(parents=True)
    found = [Removal(loser, 12.34, "adapter of a loser")]
    monkeypatch.setattr(retention, "removals", lambda *_: found)
    arguments = ["clean", "mine", "tracking=none", "--output-dir", str(tmp_path / "outputs")]
    shown = RUNNER.invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "12.3 MiB" in shown.output
    assert "adapter of a loser" in shown.output
    assert "would be freed" in shown.output
    assert loser.exists()
    assert "12.3 MiB freed" in RUNNER.invoke(app, arguments).output
    assert not loser.exists()


def test_an_unknown_model_has_no_champion_to_show(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt name is no model whose first champion is still to come."""
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    # absolute, because MLflow keeps one store for each URI in a process
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlruns/{empty_store.name}"
    assert "Nothing is registered yet" in _shown("lr_rank_swep", uri, 1)
    store = MlflowClient(uri.partition("=")[2])
    store.create_registered_model("lr_rank_sweep")
    assert "no model 'lr_rank_swep' is registered. Registered: lr_rank_sweep" in _shown(
        "lr_rank_swep", uri, 1
    )
    assert "no champion yet" in _shown("lr_rank_sweep", uri, 0)
    assert "the name is empty" in _shown(" ", uri, 2)


def _shown(model: str, uri: str, code: int) -> str:
    done = RUNNER.invoke(app, ["champion", "show", model, uri])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())
