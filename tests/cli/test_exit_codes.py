"""Every verb that ends early says why, with the exit code of its cause."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sweeper.commands import sync
from sweeper.core.signals import StopRequested
from tests.conftest import run_in_process


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BrokenPipeError(32, "Broken pipe"), 1, "broken pipe"),
        (PermissionError(13, "Permission denied", "x"), 1, "x: permission denied"),
        (KeyboardInterrupt(), 130, "stopped"),
        (StopRequested(signal.SIGTERM), 143, "stopped"),
        (StopRequested(signal.SIGUSR1), 75, "stopped"),
    ],
)
def test_no_verb_ends_without_a_word(
    error: BaseException, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that breaks inside is no reader that left, and a stop is not always Ctrl-C."""

    def ends(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(sync, "sync", ends)
    done = run_in_process(["sync", "mine"], tmp_path)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
