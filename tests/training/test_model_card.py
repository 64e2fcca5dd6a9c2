"""The model card: the hub reads it, and it says what is known and no more."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sweeper.builtin.embedded import BASE_DIR
from sweeper.core.manifest import verify_manifest
from sweeper.core.paths import write_atomic
from sweeper.core.trained_form import TrainedForm
from sweeper.modeling.model_source import hub_name
from sweeper.training.model_card import model_card
from tests.conftest import make_settings
from tests.training.conftest import RunTiny

FIGURES = {
    "eval/loss": 1.25,
    "eval/perplexity": 3.4903,
    "parameters/trainable": 4096.0,
    "parameters/trainable_percent": 0.5,
    "data/train_rows": 1200.0,
}


FORM = TrainedForm(
    base=None,
    revision=None,
    base_digest="0123456789abcdef" * 4,
    architecture="LlamaForCausalLM",
    quantization="nf4",
    dtype="bfloat16",
    max_length=96,
    template="instruction",
    end_tokens=("<|im_end|>", "</s>"),
    data_digest="fedcba9876543210" * 4,
)


def _card(folder: Path, *overrides: str, merged: bool = False, **form: object) -> ModelCard:
    settings, known = make_settings(*overrides).trial, FORM.model_copy(update=form)
    return ModelCard(model_card(settings, FIGURES, folder, known, merged=merged))


def test_hub_fields_are_filled(tmp_path: Path) -> None:
    """Base, data sets, library, tags and figures in the hub's own words."""
    write_atomic(tmp_path / "README.md", "---\nlicense: apache-2.0\n---\n# Base\n")
    names = ("model.base_model=org/base", "data.train=org/rows", "training=real", "evaluation=real")
    card = _card(tmp_path, *names, base="org/base", revision="abc")
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
    for words in ("4,096 (0.5 % of all)", "1,200 rows", "org/rows", "1.2500", "at revision abc"):
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


def test_a_card_tells_how_the_model_was_trained(tmp_path: Path) -> None:
    """Quantization, dtype, length, template, its variables and end tokens are on the card."""
    card = _card(tmp_path, base="org/base", chat_template_kwargs={"enable_thinking": False})
    words = ("nf4", "bfloat16", "96 tokens", "instruction", "enable_thinking", "<|im_end|>", "</s>")
    shown = html.unescape(card.text).replace("\\|", "|")
    assert [word for word in words if word not in shown] == []
    assert "model.generation_config = GenerationConfig.from_pretrained" in card.text


@pytest.mark.parametrize("merged", [False, True])
def test_a_card_names_no_folder_of_this_machine(tmp_path: Path, merged: bool) -> None:
    """Cards are published: local paths of base, data and template stand for their digests."""
    base, rows = tmp_path / "secret_base", tmp_path / "customers" / "acme.jsonl"
    template = tmp_path / "acme.jinja"
    for path in (base / "config.json", rows, template):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    names = (f"model.base_model={base}", f"data.train={rows}", f"data.template={template}")
    card = _card(tmp_path, *names, merged=merged, template=str(template))
    text = str(card)
    assert [word for word in ("secret_base", "acme", str(tmp_path)) if word in text] == []
    assert "sha256 0123456789ab" in text
    assert "fedcba987654" in text
    assert card.data.base_model is None


@pytest.mark.parametrize("name", ["embedded", "stand_in:llama3", "RELATIVE", "ABSOLUTE"])
def test_not_every_name_is_the_hubs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of this program and folders are none, and a folder of the hub's cache is its repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    commit = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    paths = {"RELATIVE": "org/base", "ABSOLUTE": str(tmp_path / "org" / "base")}

    def of(base: str, folder: Path) -> str | None:
        return hub_name(make_settings(f"model.base_model={base}").trial.model, folder)

    assert of(paths.get(name, name), tmp_path / "org" / "base") is None
    assert of(str(commit), commit) == "Qwen/Qwen3-0.6B"
    assert of("Qwen/Qwen3-0.6B-Base", commit) == "Qwen/Qwen3-0.6B-Base"


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
