"""R7, R8, R9, R10, R16: PostgreSQL and MLflow, the real ones, that crash, hang and come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.stack import NEEDS_POSTGRES, STORAGE, Stack, running_stack
from tests.faults.conftest import Launch
from tests.faults.sweep import spool

pytest.importorskip("psycopg", reason="the driver of PostgreSQL is optional")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_POSTGRES]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """For all tests here."""
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stored(stack: Stack, request: pytest.FixtureRequest) -> dict[str, object]:
    """Options of a sweep whose study lies in PostgreSQL, under a name of its own."""
    name = str(request.node.name)[5:60]
    return {
        "storage": stack.storage,
        "environment": {"SWEEPER_STORAGE": stack.storage, "MLFLOW_TRACKING_URI": stack.uri},
        "name": name,
    }


def test_training_outlives_postgres_and_nobody_takes_over(
    stack: Stack, launch: Launch, tmp_path: Path, stored: dict[str, object]
) -> None:
    """Crashed in mid-trial: training goes on to its end, nothing is asked until the database is back.

    Then every result is told once, in its first attempt; and another driver is refused, as before.
    """
    (tmp_path / "elsewhere").mkdir()
    overrides = ("tracking=none", STORAGE, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2")
    slow = ("workers.fake.step_seconds=0.2", "workers.stall_timeout_s=null")
    sweep = launch(*overrides, *slow, **stored)
    sweep.until_steps(2)
    stack.crash_postgres()
    begun = set(sweep.attempts())
    down = {path: len(spool(path)) for path in begun}
    sweep.until(
        lambda: all((path / "outcome.json").exists() for path in begun), "what was training ended"
    )
    assert any(len(spool(path)) > lines for path, lines in down.items()), (
        "trained while it was down"
    )
    assert sweep.attempts() == {}, "nothing was handed out"
    assert sweep.process.poll() is None
    stack.script("start")
    sweep.until(sweep.attempts, "it goes on")
    with sweep.held():
        other = launch(*overrides, *slow, folder=tmp_path / "elsewhere", **stored)
        assert "is already run by another driver (sweeper" in other.end(exit_code=1)
    sweep.end()
    trials = sweep.check_each_once(8)
    assert {trial.user_attrs["attempt"] for trial in trials} == {1}
