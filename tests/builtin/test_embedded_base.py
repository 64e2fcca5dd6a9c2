"""The embedded base: what is shipped."""

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.builtin.docstring_pairs import docstring_pairs
from sweeper.builtin.embedded import BASE_DIR
from tools.pretrain_base import EOS, PAD, REBUILD_COMMAND

PLACE = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@cache
def base() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASE_DIR)


def test_base_is_small_and_of_safe_widths() -> None:
    """1.1M parameters in 2.2 MB of bfloat16, every matrix a multiple of 32 each way."""
    model, _ = base()
    assert 1.0e6 < model.num_parameters() < 1.2e6
    assert all(size % 32 == 0 for weight in model.parameters() for size in weight.shape)
    assert (BASE_DIR / "model.safetensors").stat().st_size < 2.6e6
    with safe_open(BASE_DIR / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("text", ["def f(x=1) -> int", "  two  spaces\n\ttab", "naïve 漢字 🙂", ""])
def test_tokenizer_round_trips(text: str) -> None:
    """Any text comes back unchanged, and no token is added to it."""
    _, tokenizer = base()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_tokenizer_and_model_agree_on_special_tokens() -> None:
    """End of text and padding are two tokens of the vocabulary, the same ones everywhere."""
    model, tokenizer = base()
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 512


def test_base_has_learned() -> None:
    """Untuned, it loses at most 5 nats a token on validation outputs; guessing loses 7.6."""
    model, tokenizer = base()
    total, tokens = 0.0, 0
    for row in docstring_pairs().rows["validation"][:100]:
        prompt = tokenizer(PLACE.format(**row)).input_ids
        answer = [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer), reduction="sum"
        ).item()
        tokens += len(answer)
    assert total / tokens < 5.0 < math.log(2048) - 2


def test_base_knows_where_text_ends() -> None:
    """End of text is likelier after a whole summary than after its first half, 20 times or more."""
    model, tokenizer = base()

    def mean_log_end(share: float) -> float:
        total, rows = 0.0, docstring_pairs().rows["validation"][:60]
        for row in rows:
            ids = [tokenizer.eos_token_id, *tokenizer(row["output"]).input_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids[: max(2, int(len(ids) * share))]])).logits[0, -1]
            total += logits.log_softmax(-1)[tokenizer.eos_token_id].item()
        return total / len(rows)

    assert mean_log_end(1.0) > mean_log_end(0.5) + math.log(20)


@pytest.mark.slow
def test_base_loads_quietly_and_offline() -> None:
    """Loading by the two Auto classes warns of nothing and reaches no network."""
    code = (
        "import transformers as t; from sweeper.builtin.embedded import BASE_DIR as b;"
        "t.logging.disable_progress_bar();"
        "t.AutoModelForCausalLM.from_pretrained(b); t.AutoTokenizer.from_pretrained(b)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""


def test_model_card_names_this_build() -> None:
    """The card carries measured figures, the source's licence and the rebuild command."""
    card = (BASE_DIR / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for word in ("held-out loss", "bits/byte", "Python Software Foundation", REBUILD_COMMAND):
        assert word in card
    assert str(Path.home()) not in card
