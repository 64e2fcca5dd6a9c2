"""Wheels by version and digest: pip fetches them once, and what goes wrong is said with the way out."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.fake_wheels import write_wheel
from tools.pinned_wheel import DOWNLOAD_LIMIT_S, FetchError, fetch, members


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is all that pip can download from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_downloads_once(index: Path, tmp_path: Path) -> None:
    """pip fetches the wheel, only the wheel is kept, and the next call needs no index."""
    wheel = write_wheel(index, "some_words", {"some_words/__init__.py": b"x = 1\n"})
    assert wheel.requirement == "some-words==1.0"
    path = fetch(wheel, tmp_path / "kept")
    assert [name for name, _ in members(path, ".py")] == ["some_words/__init__.py"]
    (index / wheel.filename).unlink()
    assert fetch(wheel, tmp_path / "kept") == path
    assert [found.name for found in path.parent.iterdir()] == [wheel.filename]


def test_fetch_without_the_package_names_the_file_to_copy(index: Path, tmp_path: Path) -> None:
    """An index that lacks the package, or cannot be reached, leaves the way of a copied file."""
    wheel = replace(write_wheel(tmp_path, "some_words", {}), filename="other-2.1-py3-none-any.whl")
    with pytest.raises(
        FetchError, match=r"other==2\.1 cannot be downloaded: No matching"
    ) as raised:
        fetch(wheel, tmp_path / "kept")
    assert f"copy other-2.1-py3-none-any.whl from another machine into '{tmp_path}/kept'" in str(
        raised.value
    )
    assert not list((tmp_path / "kept").iterdir())


def test_fetch_refuses_another_digest(index: Path, tmp_path: Path) -> None:
    """A downloaded or copied wheel with other bytes is refused with both digests and the way out."""
    wheel = write_wheel(index, "some_words", {})
    pinned = replace(wheel, sha256="0" * 64)
    with pytest.raises(FetchError, match=f"its sha256 is {wheel.sha256}, expected {'0' * 64}"):
        fetch(pinned, tmp_path / "kept")
    (tmp_path / "kept" / wheel.filename).write_bytes(b"cut short")
    with pytest.raises(FetchError, match="Remove the file and run the same command again"):
        fetch(wheel, tmp_path / "kept")


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(name or service "
            "not known)'\nERROR: No matching distribution found for some-words==1.0\n",
            "NewConnectionError.*Check the network",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            "No space left on device.*Free space on the disk of",
        ),
        ("/usr/bin/python: No module named pip\n", "No module named pip.*ensurepip"),
        ("", "pip gave no reason.*Check the network"),
    ],
)
def test_fetch_says_what_pip_said(
    stderr: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network, a full disk and a missing pip are told apart, each with what to do."""
    wheel = write_wheel(tmp_path, "some_words", {})
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(FetchError) as raised:
        fetch(wheel, tmp_path / "kept")
    assert re.search(sentence, str(raised.value)), str(raised.value)


def test_fetch_gives_up_after_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that hangs ends with a sentence and leaves no part of a file."""
    wheel = write_wheel(tmp_path, "some_words", {})

    def hang(command: list[str], **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(FetchError, match=f"did not end within {DOWNLOAD_LIMIT_S} s"):
        fetch(wheel, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())
