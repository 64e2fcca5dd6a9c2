"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sweeper.core.paths import TrialFolder, read_json, size_mib, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    """Text that cannot be encoded fails half-way: the old content stands, nothing lies about."""
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_users_own_permissions(tmp_path: Path) -> None:
    """As any program would have created it, so that a team can read a study's results."""
    plain = tmp_path / "plain"
    plain.write_text("")
    path = tmp_path / "file.txt"
    write_atomic(path, "text")
    assert path.stat().st_mode == plain.stat().st_mode


def test_json_knows_no_nan(tmp_path: Path) -> None:
    """NaN is refused when writing rather than met when reading."""
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    write_json(tmp_path / "x.json", {"name": "é"})
    assert read_json(tmp_path / "x.json") == {"name": "é"}


def test_the_artifact_is_the_adapter_or_the_model(tmp_path: Path) -> None:
    """A trial that stored neither has no artifact; sizes are in MiB."""
    folder = TrialFolder(tmp_path)
    assert folder.artifact is None
    folder.adapter.mkdir()
    (folder.adapter / "weights").write_bytes(os.urandom(2**20))
    assert folder.artifact == folder.adapter
    assert size_mib(folder.adapter) == 1.0
