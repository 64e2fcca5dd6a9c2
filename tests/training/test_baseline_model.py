"""A model that another run trained: judged as it was judged then, kept, and refused if it is no kin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import TrialSettings
from sweeper.core.errors import ArtifactError, ModelError
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import TrialFolder
from sweeper.modeling.base_model import load_base
from sweeper.training.baseline_model import require_same_architecture
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny

SHORT = "data.max_length=256"
FULL = ("adapter=none", "quantization=none", SHORT)


def _settings(tiny_base: Path, rows_file: Path) -> TrialSettings:
    return make_settings(f"model.base_model={tiny_base}", f"data.train={rows_file}", *FULL).trial


def test_an_adopted_model_is_worth_what_its_own_trial_was(
    run_tiny: RunTiny, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The same value by the same judge, the whole model trainable, the files kept and manifested."""
    runner = TransformersRunner(threads=1)
    own, _, trained = run_tiny("full", *FULL, "training.learning_rate=1e-2", runner=runner)
    shutil.rmtree(trained.path / "checkpoints", ignore_errors=True)
    settings, folder = _settings(tiny_base, rows_file), TrialFolder(tmp_path / "adopted")
    outcome = runner.judge_baseline(settings, folder, {"adopted.run_id": "x"}, trained.model)
    assert outcome.cause == "finished"
    assert outcome.best_value == pytest.approx(own.best_value, abs=1e-6)
    assert outcome.steps == 0
    assert outcome.metrics["parameters/trainable"] == own.metrics["parameters/trainable"]
    verify_manifest(folder.model)
    assert json.loads(folder.provenance.read_text()) == {"adopted.run_id": "x"}
    shutil.rmtree(trained.path)  # its own copy is all that is needed
    judged = runner.test(settings, folder, ["test"]).test
    assert judged is not None


def test_a_model_without_a_tokenizer_gets_the_bases(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """A folder with config.json and weights alone is a model of transformers' layout."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(tiny_base / name, bare)
    runner, folder = TransformersRunner(threads=1), TrialFolder(tmp_path / "adopted")
    outcome = runner.judge_baseline(_settings(tiny_base, rows_file), folder, {}, bare)
    assert (outcome.cause, outcome.message) == ("finished", None)
    assert (folder.model / "tokenizer_config.json").exists()
    assert not (bare / "tokenizer_config.json").exists()


def test_what_is_no_kin_is_refused(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Other sizes, another vocabulary, an adapter, changed files: each with its words."""
    settings = _settings(tiny_base, rows_file)
    base = load_base(settings.model, settings.quantization, trained=True)
    require_same_architecture(tiny_base, base)
    with pytest.raises(
        ModelError, match=r"[Ii]ts architecture differs: hidden_size 128 instead of 32"
    ):
        require_same_architecture(BASE_DIR, base)
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="a different vocabulary"):
        require_same_architecture(other, base)
    (other / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(ArtifactError, match="not in the manifest"):
        require_same_architecture(other, base)
    (other / "config.json").rename(other / "adapter_config.json")
    with pytest.raises(ModelError, match="is an adapter, not a base"):
        require_same_architecture(other, base)
