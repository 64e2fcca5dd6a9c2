"""Sweeps that are gone when a test ends, however it ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.faults import sweep
from tests.faults.sweep import Sweep


class Launch(Protocol):
    """Starts a sweep; `folder` is the test's own unless given."""

    def __call__(self, *overrides: str, folder: Path = ..., **options: Any) -> Sweep: ...


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`sweep.start` whose programs are cleaned up."""
    started: list[Sweep] = []

    def start(*overrides: str, folder: Path = tmp_path, **options: Any) -> Sweep:
        started.append(sweep.start(folder, *overrides, **options))
        return started[-1]

    yield start
    for each in started:
        each.clean_up()
