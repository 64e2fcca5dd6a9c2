"""A stored artifact on the test split, against plain transformers and PEFT; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import ArtifactError, DataError, DoesNotFit
from sweeper.core.outcome import ExampleLosses
from sweeper.core.paths import TrialFolder
from sweeper.data.tokens import IGNORED
from sweeper.modeling.base_model import load_base
from sweeper.modeling.hardware import DeviceReport
from sweeper.training.prepared_data import prepare
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

SHORT = "data.max_length=256"
"""As many positions as `tiny_base` has."""


def _settings(tiny_base: Path, rows_file: Path, *overrides: str) -> TrialSettings:
    return make_settings(
        *(f"model.base_model={tiny_base}", f"data.train={rows_file}", SHORT),
        *("training.max_steps=6", "training.eval_steps=2", *overrides),
    ).trial


def _by_hand(model: torch.nn.Module, settings: TrialSettings) -> tuple[list[float], list[int]]:
    """Each test row alone, unpadded, through the model's own logits."""
    base = load_base(settings.model, settings.quantization, trained=False)
    found = prepare(settings.data, base).test
    assert found is not None
    assert len(found.rows) == 4
    model.eval()
    nll, tokens = [], []
    for row in found.rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        nll.append(cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item())
        tokens.append(int((targets != IGNORED).sum()))
    return nll, tokens


def _on_test(
    runner: TransformersRunner, settings: TrialSettings, folder: TrialFolder | None
) -> ExampleLosses:
    found = runner.test(settings, folder, ["test"]).test
    assert found is not None
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_stored_adapter_is_judged_as_plain_peft_finds_it(
    tiny_base: Path, rows_file: Path, tmp_path: Path, quantization: str
) -> None:
    """Per example to 1e-3 nats; the warm base comes out of it as it was: untuned before and after."""
    overrides = (f"quantization={quantization}", "training.learning_rate=0.05")
    settings = _settings(tiny_base, rows_file, *overrides)
    runner, folder = TransformersRunner(threads=1), TrialFolder(tmp_path / "lora")
    runner.run(settings, folder, {}, Recorder())
    before = _on_test(runner, settings, None)
    found = _on_test(runner, settings, folder)
    assert _on_test(runner, settings, None) == before
    base = load_base(settings.model, settings.quantization, trained=False).model
    nll, tokens = _by_hand(base, settings)
    assert before.nll == pytest.approx(nll, abs=1e-3)
    nll, tokens = _by_hand(PeftModel.from_pretrained(base, folder.adapter), settings)
    assert found.nll == pytest.approx(nll, abs=1e-3)
    assert found.tokens == tuple(tokens)
    assert abs(found.loss - before.loss) > 0.01


def test_stored_weights_are_judged_as_plain_transformers_finds_them(
    run_tiny: RunTiny, tiny_base: Path, rows_file: Path
) -> None:
    """A full fine-tune's model folder, loaded by transformers alone, gives the same losses."""
    overrides = ("adapter=none", "quantization=none", "training.learning_rate=1e-2")
    runner = TransformersRunner(threads=1)
    *_, folder = run_tiny(
        "full", SHORT, "adapter=none", "training.learning_rate=1e-2", runner=runner
    )
    settings = _settings(tiny_base, rows_file, *overrides)
    found = _on_test(runner, settings, folder)
    nll, tokens = _by_hand(AutoModelForCausalLM.from_pretrained(folder.model), settings)
    assert found.nll == pytest.approx(nll, abs=1e-3)
    assert found.tokens == tuple(tokens)


def test_weights_that_were_changed_are_not_judged(
    run_tiny: RunTiny, tiny_base: Path, rows_file: Path
) -> None:
    """The manifest is checked first; a folder without an artifact is refused as well."""
    *_, folder = run_tiny("lora", SHORT, "training.max_steps=2")
    runner = TransformersRunner(threads=1)
    settings = _settings(tiny_base, rows_file, "quantization=none")
    (folder.adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: changed"):
        runner.test(settings, folder, ["test"])
    folder.clear_results()
    with pytest.raises(ArtifactError, match="contains neither an adapter nor a model"):
        runner.test(settings, folder, ["test"])


def test_without_unseen_texts_nothing_is_judged(tiny_base: Path, rows_file: Path) -> None:
    """Neither test split nor general text: errors that name the settings."""
    nothing = ("data.test_ratio=0", "evaluation.general_text.source=null")
    settings = _settings(tiny_base, rows_file, *nothing)
    runner = TransformersRunner(threads=1)
    with pytest.raises(DataError, match=r"data\.test_ratio"):
        runner.test(settings, None, ["test"])
    with pytest.raises(DataError, match=r"evaluation\.general_text\.source"):
        runner.test(settings, None, ["general"])


def test_general_text_is_judged_without_a_test_split(
    run_tiny: RunTiny, tiny_base: Path, rows_file: Path
) -> None:
    """The mean loss that transformers itself finds on the same windows, before and after tuning."""
    runner = TransformersRunner(threads=1)
    *_, folder = run_tiny("lora", SHORT, "training.learning_rate=0.05", runner=runner)
    settings = _settings(tiny_base, rows_file, "quantization=none", "data.test_ratio=0")
    before, after = (runner.test(settings, each, ["general"]) for each in (None, folder))
    assert (before.test, after.test) == (None, None)
    assert before.general is not None
    assert after.general is not None
    model = load_base(settings.model, settings.quantization, trained=False)
    prepared = prepare(settings.data, model)
    ids = torch.tensor([row["input_ids"] for row in prepared.general_rows(settings)])
    assert ids.shape == (16, 128)
    tuned = PeftModel.from_pretrained(model.model, folder.adapter).eval()
    with torch.no_grad(), tuned.disable_adapter():
        assert before.general.loss == pytest.approx(tuned(ids, labels=ids).loss.item(), abs=1e-4)
    with torch.no_grad():
        assert after.general.loss == pytest.approx(tuned(ids, labels=ids).loss.item(), abs=1e-4)
    assert abs(after.general.loss - before.general.loss) > 1e-3


def test_general_text_that_cannot_be_had_is_found_at_the_start(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The probe reads it: nobody trains for hours first; its digest is among the facts."""
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    source = f"evaluation.general_text.source={short}"
    with pytest.raises(DataError, match="0 windows of 128 tokens"):
        TransformersRunner(threads=1).probe(_settings(tiny_base, rows_file, source))


@pytest.mark.parametrize(("free_mib", "fits"), [(1.0, False), (4.0, True)])
def test_a_full_fine_tune_must_fit_with_its_optimizer(
    tiny_base: Path,
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_mib: float,
    fits: bool,
) -> None:
    """About 16 bytes a parameter (fp32 weight, gradient, two moments) against what is free."""
    report = DeviceReport("fake", "", bf16=False, total_mib=8.0, free_mib=free_mib)
    monkeypatch.setattr("sweeper.training.trial_runner.device_report", lambda _: report)
    runner = TransformersRunner(threads=1)
    settings = _settings(tiny_base, rows_file, "adapter=none", "quantization=none")
    if fits:
        assert runner.probe(settings).base_parameters > 0
        return
    with pytest.raises(DoesNotFit) as caught:
        runner.probe(settings)
    parameters = AutoModelForCausalLM.from_pretrained(tiny_base).num_parameters()
    assert caught.value.misfit.need_mib == pytest.approx(16 * parameters / 2**20, rel=0.01)
    assert caught.value.misfit.have_mib == 1.0
    assert runner.probe(_settings(tiny_base, rows_file)).base_parameters == parameters
