"""The losses of each row that looks were at: stored for every look, on the same rows in all trials."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sweeper.core.paths import TrialFolder
from sweeper.evaluation.token_loss import LossSum
from sweeper.training.look_losses import LookLosses, read_looks
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

SAMPLE = ("evaluation.look_rows=2", "training.max_steps=8")


def test_looks_are_at_the_same_rows_and_give_what_was_reported(run_tiny: RunTiny) -> None:
    """Two rates, one sample: the sums over its rows are the losses that the pruner was told."""
    stored = []
    for name, rate in (("a", "0.02"), ("b", "0.005")):
        _, reported, folder = run_tiny(name, *SAMPLE, f"training.learning_rate={rate}")
        looks = read_looks(folder.look_losses)
        assert all(look.cpu_seconds and look.cpu_seconds > 0 for look in looks[:2])
        means = [(look.step, math.fsum(look.nll) / sum(look.tokens)) for look in looks]
        assert means == [pytest.approx(item, abs=1e-12) for item in reported]
        stored.append(looks)
    first, second = stored
    assert {(look.rows, look.tokens) for look in (*first, *second)} == {
        (first[0].rows, first[0].tokens)
    }
    assert first[-1].nll != second[-1].nll


@pytest.mark.slow
def test_a_killed_attempt_makes_the_looks_of_one_that_was_not(
    run_tiny: RunTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a look that no checkpoint holds any more, resumed, pruned: the same to the bit."""

    class Killed(BaseException):
        pass

    class Killer(Recorder):
        def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
            if step >= 5:
                raise Killed

    whole, _, uninterrupted = run_tiny("whole", *SAMPLE, observer=Recorder(stop_after=3))
    monkeypatch.setattr("sweeper.training.trial_callback.PROGRESS_SECONDS", 0.0)
    with pytest.raises(Killed):
        run_tiny("killed", *SAMPLE, observer=Killer())
    folder = TrialFolder(tmp_path / "killed")
    LookLosses(folder.look_losses, [], 99).write(6, [LossSum(1.0, 1)])
    resumed, _, _ = run_tiny("killed", *SAMPLE, observer=Recorder(stop_after=1))
    assert resumed.cause == whole.cause == "pruned"
    assert (resumed.best_value, resumed.best_step) == (whole.best_value, whole.best_step)
    assert resumed.look_rows == whole.look_rows == 2
    assert read_looks(folder.look_losses) == read_looks(uninterrupted.look_losses)


def test_a_look_of_an_older_version_has_no_seconds(tmp_path: Path) -> None:
    """A line without CPU seconds is read, and is the same look as one with them."""
    path = tmp_path / "look_losses.jsonl"
    LookLosses(path, [], 0).write(2, [LossSum(1.5, 3)], cpu_seconds=0.25)
    (look,) = read_looks(path)
    fields = json.loads(path.read_text("utf-8"))
    del fields["cpu_seconds"]
    path.write_text(json.dumps(fields) + "\n", "utf-8")
    (older,) = read_looks(path)
    assert (look.cpu_seconds, older.cpu_seconds) == (0.25, None)
    assert look == older


def test_a_line_that_is_cut_is_left_out(tmp_path: Path) -> None:
    """A power failure costs one look, not the file."""
    path = tmp_path / "look_losses.jsonl"
    LookLosses(path, [], 0).write(2, [LossSum(1.5, 3)])
    path.write_text(path.read_text("utf-8") + '{"step": 4, "rows": "x", "nll": [1.', "utf-8")
    (look,) = read_looks(path)
    assert (look.step, look.nll, look.tokens) == (2, (1.5,), (3,))
