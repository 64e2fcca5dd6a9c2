"""The model card: the hub reads it, and it says what is known and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sweeper.builtin.embedded import BASE_DIR
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import write_atomic
from sweeper.training.model_card import hub_id, model_card
from tests.conftest import make_settings
from tests.training.conftest import RunTiny

FIGURES = {
    "eval/loss": 1.25,
    "eval/perplexity": 3.4903,
    "parameters/trainable": 4096.0,
    "parameters/trainable_percent": 0.5,
    "data/train_rows": 1200.0,
}


def _card(folder: Path, *overrides: str) -> ModelCard:
    return ModelCard(model_card(make_settings(*overrides).trial, FIGURES, folder))


def test_hub_fields_are_filled(tmp_path: Path) -> None:
    """Base, data sets, library, tags and figures in the hub's own words."""
    write_atomic(tmp_path / "README.md", "---\nlicense: apache-2.0\n---\n# Base\n")
    names = ("model.base_model=org/base", "data.train=org/rows", "training=real", "evaluation=real")
    card = _card(tmp_path, *names)
    data = card.data
    assert (data.base_model, data.datasets, data.license) == (
        "org/base",
        ["org/rows"],
        "apache-2.0",
    )
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.tags == ["qlora", "lora", "sweeper"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": 1.25, "perplexity": 3.4903}
    for words in ("4,096 (0.5 % of all)", "1,200 rows", "org/rows", "1.2500"):
        assert words in card.text


def test_what_is_unknown_is_said(tmp_path: Path) -> None:
    """A base without a licence, and names that are no ids of the hub, are not made up."""
    card = _card(tmp_path, "adapter=none", "quantization=none")
    assert card.data.license == "unknown"
    assert "set `license` above before you publish" in card.text
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.library_name == "transformers"


def test_special_licence_comes_with_its_link() -> None:
    """license: other needs its name and link, which the embedded base's card has."""
    data = _card(BASE_DIR).data
    assert (data.license, data.license_name) == ("other", "psf-2.0")
    assert data.license_link.startswith("https://")


@pytest.mark.parametrize("name", ["embedded", "stand_in:llama3", "/a/folder", "rows.jsonl.gz/x/y"])
def test_not_every_name_is_the_hubs(name: str) -> None:
    """Words of this program, folders and files are none."""
    assert hub_id(name) is None
    assert hub_id("Qwen/Qwen3-0.6B-Base") == "Qwen/Qwen3-0.6B-Base"


def test_artifact_carries_the_card(run_tiny: RunTiny) -> None:
    """README.md of adapter/ is this card with the kept checkpoint's loss, and the manifest covers it."""
    outcome, _, folder = run_tiny("t")
    card = ModelCard.load(folder.adapter / "README.md")
    losses = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert losses["loss"] == pytest.approx(outcome.best_value, abs=1e-6)
    assert "More Information Needed" not in card.text
    verify_manifest(folder.adapter)
    text = (folder.adapter / "README.md").read_text()
    (folder.adapter / "README.md").write_text(text + "x")
    with pytest.raises(Exception, match=r"README\.md: changed"):
        verify_manifest(folder.adapter)
