"""Stored adapters on the gate split: the same losses as any judge's, on rows that nobody trained on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from sweeper.core.errors import ArtifactError, DataError
from sweeper.core.outcome import GateRequest
from sweeper.core.paths import TrialFolder
from sweeper.data.duplicates import normalised
from sweeper.data.splits import load_examples, load_splits
from sweeper.nightly.certify import judge_here
from sweeper.nightly.challenge import CHALLENGER, CHAMPION, judge_in_subprocess, judged
from sweeper.training.gate_judge import judge_on_gate
from tests.conftest import make_settings
from tests.training.conftest import RunTiny


def _write(path: Path, first: int, count: int) -> Path:
    rows = [
        {"instruction": "Say it.", "input": f"def f{i}(x)", "output": f"Return x times {i}."}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Thirty rows of their own."""
    return _write(tmp_path / "gate.jsonl", 500, 30)


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows by which the trial chose its checkpoint."""
    return _write(tmp_path_factory.mktemp("chosen") / "validation.jsonl", 900, 10)


@pytest.fixture(scope="module")
def trained(
    run_tiny_at: RunTiny, validation: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrialFolder:
    """A trial that never saw the gate; each test copies it."""
    folder = tmp_path_factory.mktemp("trained")
    return run_tiny_at(folder, f"data.validation={validation}", "training.eval_steps=6")[2]


@pytest.fixture
def trial(trained: TrialFolder, tmp_path: Path) -> TrialFolder:
    """A copy of the trial that never saw the gate."""
    shutil.copytree(trained.path, tmp_path / "a")
    return TrialFolder(tmp_path / "a")


def test_losses_are_those_of_the_trials_own_judge(
    run_tiny: RunTiny, trial: TrialFolder, gate: Path
) -> None:
    """The stored adapter has the loss that the same training had with the gate as validation."""
    outcome, _, _ = run_tiny("b", f"data.validation={gate}", "training.eval_steps=6")
    answer = judge_on_gate(GateRequest(gate=str(gate), trials={CHALLENGER: trial.path}))
    tokens = sum(answer.tokens)
    assert len(answer.tokens) == 30
    assert outcome.best_value is not None
    loss = math.fsum(answer.nll[CHALLENGER]) / tokens
    assert loss == pytest.approx(outcome.best_value, abs=1e-5)
    assert loss < math.fsum(answer.nll["base"]) / tokens


def test_rows_of_other_splits_are_left_out(
    trial: TrialFolder, gate: Path, rows_file: Path, validation: Path
) -> None:
    """Five rows of the training file and the ten validation rows are counted and not judged."""
    trained = rows_file.read_text().splitlines(keepends=True)[:5]
    chosen = validation.read_text()
    gate.write_text(gate.read_text() + "".join(trained) + chosen)
    answer = judge_on_gate(GateRequest(gate=str(gate), trials={CHALLENGER: trial.path}))
    assert (len(answer.tokens), answer.left_out) == (30, 15)


def test_forgetting_is_measured_beside_the_gate(trial: TrialFolder, gate: Path) -> None:
    """General text that the trial's settings name: the base's and the adapter's, window by window."""
    answer = judge_on_gate(GateRequest(gate=str(gate), trials={CHALLENGER: trial.path}))
    assert answer.general_tokens == [127] * 16
    assert set(answer.general) == {"base", CHALLENGER}
    by_hand = sum(answer.general[CHALLENGER]) - sum(answer.general["base"])
    assert answer.forgotten(CHALLENGER) == pytest.approx(by_hand / (16 * 127))
    assert answer.forgotten(CHALLENGER) != 0


def test_a_certificate_rests_on_the_trials_own_test_split(trial: TrialFolder) -> None:
    """Four of the forty rows, read by nobody before; the adapter's losses are not the base's."""
    tuned, untuned = judge_here(trial)
    for found in (tuned, untuned):
        assert found.test is not None
        assert len(found.test.nll) == 4
        assert found.general is not None
    assert tuned.test != untuned.test


@pytest.mark.slow
def test_the_embedded_gate_is_in_no_split_of_the_embedded_pairs() -> None:
    """Pairs of modules that no split reads: enough of them, and none that equals a row of a split."""
    data = make_settings().data
    gate = load_examples("embedded", data)
    assert len(gate) >= 60
    seen = {
        normalised(each.text) for found in load_splits(data).examples.values() for each in found
    }
    unseen = [each for each in gate if normalised(each.text) not in seen]
    assert len(unseen) >= 60


def test_rows_of_other_splits_but_for_case_are_left_out(
    trial: TrialFolder, gate: Path, rows_file: Path
) -> None:
    """A training row in capitals with more white space is still a training row."""
    row = json.loads(rows_file.read_text().splitlines()[0])
    loud = {key: f" {value.upper()} " for key, value in row.items()}
    gate.write_text(gate.read_text() + json.dumps(loud) + "\n")
    answer = judge_on_gate(GateRequest(gate=str(gate), trials={CHALLENGER: trial.path}))
    assert (len(answer.tokens), answer.left_out) == (30, 1)


def test_gate_of_trained_rows_is_refused(trial: TrialFolder, rows_file: Path) -> None:
    """The training file itself is no gate."""
    with pytest.raises(DataError, match="0 of its 40 rows occur in no other split"):
        judge_on_gate(GateRequest(gate=str(rows_file), trials={CHALLENGER: trial.path}))


def test_missing_and_changed_adapters_are_refused(trial: TrialFolder, gate: Path) -> None:
    """An adapter that was cleaned away, and one whose weights are not those that were stored."""
    weights = trial.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"0")
    request = GateRequest(gate=str(gate), trials={CHALLENGER: trial.path})
    with pytest.raises(ArtifactError, match="changed"):
        judge_on_gate(request)
    shutil.rmtree(trial.adapter)
    with pytest.raises(ArtifactError, match="is missing"):
        judge_on_gate(request)


@pytest.mark.parametrize("stored", ["outcome", "provenance"])
def test_an_adapter_is_not_judged_on_another_base(
    trial: TrialFolder, gate: Path, stored: str
) -> None:
    """The folder of its base holds other weights than it was trained on; older trials tell it too."""
    outcome = json.loads(trial.outcome.read_text())
    assert outcome["inputs"]["base"]
    outcome["inputs"]["base"] = "0" * 64
    if stored == "provenance":
        outcome["inputs"] = None
        trial.provenance.write_text(json.dumps({"base.digest": "0" * 64}))
    trial.outcome.write_text(json.dumps(outcome))
    request = GateRequest(gate=str(gate), trials={CHALLENGER: trial.path})
    with pytest.raises(ArtifactError, match="its base model has changed since its training"):
        judge_on_gate(request)


@pytest.mark.slow
def test_a_process_of_its_own_answers(trial: TrialFolder, gate: Path, tmp_path: Path) -> None:
    """Two trials and the base come back as figures; what cannot be judged comes back as a sentence."""
    trials = {CHALLENGER: trial.path, CHAMPION: trial.path}
    figures = judge_in_subprocess(str(gate), trials)
    assert figures.problem is None
    assert figures.nll[CHALLENGER] == pytest.approx(figures.nll[CHAMPION])
    assert judged(figures, "base").nll.shape == (1, 30)
    missing = judge_in_subprocess(str(tmp_path / "gone.jsonl"), trials)
    assert missing.problem is not None
    assert "gone.jsonl" in missing.problem
