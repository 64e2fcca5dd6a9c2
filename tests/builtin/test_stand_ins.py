"""Stand-ins look like what they stand in for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from sweeper.builtin.stand_in_data import DATA, data_path
from sweeper.builtin.stand_in_models import FAMILIES, LAYERS, model_folder
from sweeper.core.errors import DataError, ModelError

REAL = {"qwen3": Qwen3Config, "qwen2_5": Qwen2Config, "llama3_2": LlamaConfig}
REAL |= {"llama3": LlamaConfig, "gpt2": GPT2Config}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for this file, apart from the user's."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_stand_in_has_the_module_names_of_the_real_class(family: str) -> None:
    """Every module of the family's default configuration, but for the number of layers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(f"stand_in:{family}"))
    sizes = {"n_layer": LAYERS} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(REAL[family](**sizes))
    assert type(model) is type(real)
    assert {name for name, _ in model.named_modules()} == {name for name, _ in real.named_modules()}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2"}))
def test_chat_templates_end_turns_with_one_token(family: str) -> None:
    """A rendered answer ends with the family's end-of-turn token, known to the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(f"stand_in:{family}"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    text = tokenizer.decode(ids).strip()
    end = "<|eot_id|>" if family.startswith("llama") else "<|im_end|>"
    assert text.endswith(end)
    assert tokenizer.convert_tokens_to_ids(end) in ids


@pytest.mark.parametrize("name", ["alpaca", "finetome"])
def test_hub_layouts_load_with_datasets(name: str, tmp_path: Path) -> None:
    """`datasets` reads the folder as it reads a cloned hub data set."""
    rows = load_dataset(str(data_path(f"stand_in:{name}")), split="train", cache_dir=str(tmp_path))
    wanted = {"alpaca": "instruction", "finetome": "conversations"}[name]
    assert wanted in rows.column_names
    assert len(rows) > 500


def test_unknown_stand_ins_list_those_that_exist() -> None:
    """The error names every stand-in of its kind."""
    with pytest.raises(ModelError, match="gpt2, llama3, llama3_2, qwen2_5, qwen3"):
        model_folder("stand_in:gpt5")
    with pytest.raises(DataError, match=", ".join(sorted(DATA))):
        data_path("stand_in:web")
