"""A damaged checkpoint is found before it is loaded; the one before it is continued, and it is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder, read_json, write_json
from sweeper.core.spool import read_spool
from sweeper.training.checkpoint import fall_back, newest_checkpoint, remove_old
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

STEPS = ("training.max_steps=8", "training.logging_steps=2")
Whole = tuple[Outcome, list[tuple[int, float]]]


def _truncate(checkpoint: Path) -> None:
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _empty(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"")


def _flip_a_bit(checkpoint: Path) -> None:
    weights = checkpoint / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


def _half_written(checkpoint: Path) -> None:
    for name in ("manifest.json", "trainer_state.json", "optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()


def _torn_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b'{"files": {"adapter_config.js\xff')


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "adapter_model.safetensors: changed"),
    "empty": (_empty, "optimizer.pt: changed"),
    "bit flipped": (_flip_a_bit, "adapter_model.safetensors: changed"),
    "half written": (_half_written, "was not written completely"),
    "torn manifest": (_torn_manifest, "cannot be read as a manifest"),
}


class Killed(BaseException):
    """Ends an attempt as SIGKILL does: nothing is tidied up."""


class Killer(Recorder):
    """Kills at step 7."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Called for each step."""
        if step >= 7:
            raise Killed


@pytest.fixture(scope="module")
def kept(run_tiny_at: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trial that was killed in step 7 of 8; each test copies it."""
    path = tmp_path_factory.mktemp("kept") / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeper.training.trial_callback.PROGRESS_SECONDS", 0.0)
        with pytest.raises(Killed):
            run_tiny_at(path, *STEPS, observer=Killer())
    return path


@pytest.fixture(scope="module")
def whole(run_tiny_at: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The outcome and the evaluations of the same trial, never interrupted."""
    outcome, losses, _ = run_tiny_at(tmp_path_factory.mktemp("whole"), *STEPS)
    return outcome, losses


@pytest.fixture
def killed(tmp_path: Path, kept: Path) -> TrialFolder:
    """A trial that was killed in step 7 of 8, with checkpoints of steps 4 and 6."""
    folder = TrialFolder(tmp_path / "killed")
    shutil.copytree(kept, folder.path)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["checkpoint-4", "checkpoint-6", "spent.json"]
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_falls_back_to_the_checkpoint_before(damage: str, killed: TrialFolder) -> None:
    """Truncated, empty, one bit flipped, half-written, or its manifest torn: step 4 it is, and why."""
    hurt, words = DAMAGES[damage]
    assert newest_checkpoint(killed.checkpoints).step == 6  # type: ignore[union-attr]
    hurt(killed.checkpoints / "checkpoint-6")
    assert newest_checkpoint(killed.checkpoints).step == 4  # type: ignore[union-attr]
    found, remarks = fall_back(killed.checkpoints)
    assert found is not None
    assert found.step == 4
    (remark,) = remarks
    assert remark.startswith("checkpoint-6 is damaged (")
    assert words in remark
    assert [path.name for path in killed.checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_damaged_best_checkpoint_rules_out_those_that_refer_to_it(killed: TrialFolder) -> None:
    """The trial's end is taken from the best one: without it a newer checkpoint leads nowhere."""
    state = killed.checkpoints / "checkpoint-6" / "trainer_state.json"
    assert read_json(state)["best_global_step"] == 6
    text = state.read_text().replace('"best_global_step": 6', '"best_global_step": 4')
    state.write_text(text)
    from sweeper.training.checkpoint import seal

    seal(state.parent)
    _flip_a_bit(killed.checkpoints / "checkpoint-4")
    found, remarks = fall_back(killed.checkpoints)
    assert found is None
    assert len(remarks) == 2


def test_a_trial_goes_on_from_the_whole_one_and_says_so(
    killed: TrialFolder, whole: Whole, run_tiny: RunTiny
) -> None:
    """With the newest bit-flipped: the losses of a run never interrupted, and a line in the log."""
    _flip_a_bit(killed.checkpoints / "checkpoint-6")
    outcome, resumed, folder = run_tiny("killed", *STEPS)
    assert outcome.cause == "finished"
    assert [step for step, _ in resumed] == [6, 8]
    assert resumed == [pytest.approx(item, abs=1e-6) for item in whole[1][2:]]
    text = folder.log_text.read_text(encoding="utf-8")
    assert "Continued      from step 4, because checkpoint-6 is damaged (adapter_model" in text
    assert not folder.checkpoints.exists()


def test_rows_grouped_by_length_come_in_the_same_order_after_a_kill(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a later epoch: the losses of a run never interrupted."""
    monkeypatch.setattr("sweeper.training.trial_callback.PROGRESS_SECONDS", 0.0)
    grouped = (*STEPS, "training.train_sampling_strategy=group_by_length")
    grouped = (*grouped, "training.per_device_train_batch_size=8")  # four steps an epoch
    with pytest.raises(Killed):
        run_tiny("killed", *grouped, observer=Killer())
    _, resumed, folder = run_tiny("killed", *grouped)
    _, whole, expected = run_tiny("whole", *grouped)
    assert resumed == [pytest.approx(item, abs=1e-6) for item in whole[3:]]
    trained = [row for row in read_spool(folder.metrics) if "train/loss" in row]
    rows = [row for row in read_spool(expected.metrics) if "train/loss" in row]
    losses = [row["train/loss"] for row in rows]
    assert [row["train/loss"] for row in trained] == pytest.approx(losses, abs=1e-6)


def test_what_earlier_attempts_cost_is_counted(
    killed: TrialFolder, whole: Whole, run_tiny: RunTiny
) -> None:
    """Seconds, by stage and in all, CPU time and tokens, up to the newest checkpoint."""
    spent = read_json(killed.spent)
    spent["elapsed"] += 1000.0
    spent["seconds"]["train"] += 900.0
    write_json(killed.spent, spent)
    outcome, _, folder = run_tiny("killed", *STEPS)
    assert 1000 < outcome.metrics["cost/seconds"] < 1200
    assert 900 < outcome.metrics["cost/train_seconds"] < 1000
    uninterrupted, _ = whole
    for name in ("samples", "target_tokens"):
        figure = f"cost/{name}_per_second"
        total = outcome.metrics[figure] * outcome.metrics["cost/train_seconds"]
        expected = uninterrupted.metrics[figure] * uninterrupted.metrics["cost/train_seconds"]
        assert total == pytest.approx(expected, rel=1e-6), name
    assert not folder.spent.exists()


def test_a_cancelled_trials_costs_are_not_its_successors(killed: TrialFolder) -> None:
    """Its own outcome has told them; the trial that goes on from its checkpoints counts its own."""
    successor = TrialFolder(killed.path.with_name("successor"))
    successor.continue_from(killed)
    assert newest_checkpoint(successor.checkpoints) is not None
    assert not successor.spent.exists()


def test_a_checkpoint_holds_no_model_card(killed: TrialFolder) -> None:
    """PEFT would render one at every save; the artifact gets ours, once."""
    assert list(killed.checkpoints.rglob("adapter_config.json"))
    assert not list(killed.checkpoints.rglob("README.md"))


def test_the_newest_checkpoints_stay_and_the_best_besides(tmp_path: Path) -> None:
    """save_total_limit=2: a damaged newest one falls back to the one before, not to a best long ago."""
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, 2, best_step=4)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (4, 8, 10)}
    remove_old(tmp_path, 2, best_step=None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-10"}


def test_a_trial_killed_after_its_last_step_takes_no_further_one(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while its result was stored, in the middle of an epoch: the same outcome, no step more."""
    middle = (
        "training.max_steps=6",
        "training.per_device_train_batch_size=8",
    )  # four steps an epoch
    with monkeypatch.context() as patch:
        patch.setattr("sweeper.training.train_trial.save_artifact", _die)
        with pytest.raises(Killed):
            run_tiny("killed", *STEPS, *middle)
    outcome, judged, folder = run_tiny("killed", *STEPS, *middle)
    whole, _, expected = run_tiny("whole", *STEPS, *middle)
    assert judged == []
    assert (outcome.cause, outcome.steps) == ("finished", whole.steps)
    assert outcome.best_value == pytest.approx(whole.best_value, abs=1e-6)
    steps = [row["step"] for row in read_spool(folder.metrics)]
    assert steps == [row["step"] for row in read_spool(expected.metrics)]


def _die(*_: object) -> None:
    raise Killed
