"""A user's folder as an earlier version left it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sweeper.tracking import mlflow_tracker
from tests.past.past import unpack


@pytest.fixture
def past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the studies and the night of commit c705442 in it."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    # since then max_length follows the data of every base but the embedded one (CHANGELOG.md), so a
    # set that continues its study says the value of before
    nightly = tmp_path / "conf/nightly/mine.yaml"
    document = yaml.safe_load(nightly.read_text())
    document["experiments"][0]["overrides"].append("data.max_length=512")
    nightly.write_text(yaml.safe_dump(document))
    # no test waits for a server that is away
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(mlflow_tracker, "CLOSE_SECONDS", 0.2)
    return tmp_path
