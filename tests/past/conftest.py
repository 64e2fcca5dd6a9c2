"""A user's folder as an earlier version left it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeper.tracking import mlflow_tracker
from tests.past.past import unpack


@pytest.fixture
def past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the studies and the night of commit c705442 in it."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    # no test waits for a server that is away
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(mlflow_tracker, "CLOSE_SECONDS", 0.2)
    return tmp_path
