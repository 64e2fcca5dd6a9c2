"""A base whose parts do not fit each other is refused with what is wrong, or mended with a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
)

from sweeper.builtin.embedded import BASE_DIR
from sweeper.core.errors import ModelError
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.modeling.fit_of_base import require_causal
from sweeper.modeling.model_source import in_full, load_config, require_causal_class
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS, save

SMALL_BERT = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "vocab_size": 2048},
}


def _load(folder: Path, *overrides: str, quantization: str = "none") -> LoadedBase:
    quantized = f"quantization={quantization}"
    settings = make_settings(f"model.base_model={folder}", quantized, *overrides)
    return load_base(settings.model, settings.quantization, trained=False)


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of a small base, to be spoiled."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def _add_tokens(folder: Path, **special: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    # ids below the table's end first, so that the named tokens lie beyond it
    tokenizer.add_tokens([f"<fill{n}>" for n in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


def test_a_padding_token_beyond_the_embedding_becomes_the_end_token(base: Path) -> None:
    """Padding has no loss, so any token of the table can pad; the change is said."""
    _add_tokens(base, pad_token="<pad beyond>")
    loaded = _load(base)
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert any("<pad beyond>" in remark for remark in loaded.remarks)


def test_another_token_beyond_the_embedding_is_named(base: Path) -> None:
    """Its row would be read from outside of the table, in the middle of an epoch."""
    _add_tokens(base, bos_token="<begin beyond>")
    with pytest.raises(ModelError, match=r"tokens <begin beyond> have no row.*which has 2,048"):
        _load(base)


def test_a_token_for_pictures_needs_no_row(base: Path) -> None:
    """Gemma 3 without its vision tower has a token for pictures, and no row for it."""
    tokenizer = AutoTokenizer.from_pretrained(base, extra_special_tokens={"image_token": "<image>"})
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<fill{n}>" for n in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(base)
    assert not _load(base).remarks


def test_an_adapter_beside_a_model_is_refused(base: Path) -> None:
    """transformers would load the adapter's own base in place of the weights in the folder."""
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ModelError, match=r"adapter_config\.json beside config\.json.*Move"):
        _load(base)


def test_a_folder_without_a_tokenizer_says_what_to_copy(base: Path) -> None:
    """A checkpoint of a training often has none."""
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"contains no tokenizer\. Copy"):
        _load(base)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BertConfig(architectures=["BertForMaskedLM"]), "is an encoder, which reads"),
        (BartConfig(architectures=["BartModel"]), "is an encoder with a decoder"),
        (T5Config(), "t5 is no causal language model"),
    ],
)
def test_a_class_that_cannot_continue_text_is_named(config, words: str) -> None:  # type: ignore[no-untyped-def]
    """The message says what the model is and how to recognise one that can."""
    with pytest.raises(ModelError, match=words):
        require_causal_class(config, "model.base_model='x'")


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """The check needs config.json alone, so dry_run and the checks of points meet it too."""
    BertForMaskedLM(BertConfig(**SMALL_BERT)).save_pretrained(tmp_path)
    settings = make_settings(f"model.base_model={tmp_path}")
    with pytest.raises(ModelError, match="is an encoder"):
        load_config(settings.model)


def test_weights_that_read_both_ways_are_found_by_their_logits() -> None:
    """A class that decodes may still not be causal: its configuration can say anything."""
    with pytest.raises(ModelError, match="in both directions"):
        require_causal(BertLMHeadModel(BertConfig(**SMALL_BERT)), "here")
    require_causal(BertLMHeadModel(BertConfig(**SMALL_BERT, is_decoder=True)), "here")


@pytest.mark.slow
def test_a_class_that_cannot_compute_with_packed_weights_says_what_to_set(tmp_path: Path) -> None:
    """Mamba multiplies with a weight itself: NF4 is refused when the base is loaded."""
    config = MambaConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(tmp_path)
    _load(tmp_path)
    with pytest.raises(ModelError, match=r"MambaForCausalLM does not compute.*quantization=none"):
        _load(tmp_path, quantization="nf4")


def test_a_librarys_words_are_kept_whole() -> None:
    """Lines after the first often carry the cause."""
    error = ValueError("Unexpected value.\n  hidden_size must be a multiple of heads")
    whole = "here: Unexpected value. hidden_size must be a multiple of heads"
    assert in_full("here", error) == whole


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_auto_attention_starts_every_class(name: str, tmp_path: Path) -> None:
    """A class without sdpa starts with eager, and says so; sdpa by name is refused there."""
    folder = save(CONFIGS[name], tmp_path / name)
    loaded = _load(folder)
    eager = name == "gemma2"
    assert (loaded.model.config._attn_implementation == "eager") is eager
    assert [remark for remark in loaded.remarks if "eager" in remark] == [
        f"{type(loaded.model).__name__} has no sdpa attention, so its attention is eager"
    ] * eager
    if eager:
        with pytest.raises(ModelError, match=r"does not support an attention implementation"):
            _load(folder, "model.attn_implementation=sdpa")


def test_the_embedded_base_has_nothing_to_say() -> None:
    """Its parts fit each other."""
    assert not _load(BASE_DIR).remarks
    assert AutoModelForCausalLM.from_pretrained(BASE_DIR) is not None
