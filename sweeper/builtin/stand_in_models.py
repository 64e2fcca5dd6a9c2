"""Build stand-in models: small, randomly initialised models of real architectures, with tokenizers.

The models have four layers of width 64. Module names, grouped attention heads, tied or untied
embeddings and chat template are those of the real family, so that target-module presets, layer ranges,
quantization and templates behave as on the real model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sweeper.builtin.stand_in_data import pairs
from sweeper.builtin.stand_ins import PREFIX, stand_in_folder
from sweeper.core.errors import ModelError

# Small enough to train in seconds on a CPU.
VOCABULARY = 1024
POSITIONS = 1024
WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS = 64, 4, 4, 2
SEED = 0

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class StandInFamily:
    """Configuration, special tokens and chat template of a model family."""

    config: Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None
    chat_template: str | None


def model_folder(name: str) -> Path:
    """Return the folder of a stand-in model (`stand_in:qwen3`), and build the model if it is missing.

    Raises:
        ModelError: There is no such stand-in. The message lists the known ones.
    """
    family = name.removeprefix(PREFIX)
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{name}: no such stand-in. Stand-ins for models are {known}.")
    return stand_in_folder("model", family, lambda folder: _build(FAMILIES[family], folder))


def _build(family: StandInFamily, folder: Path) -> None:
    tokenizer = _tokenizer(family)
    with torch.random.fork_rng():  # a worker's own random state must not change
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(family.config(tokenizer), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(family: StandInFamily) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (as of GPT-2, Qwen and Llama 3) on the stand-in text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(family.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text round-trips
        show_progress=False,
    )
    texts = [text for row in pairs() for text in row.values()]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.chat_template
    return tokenizer


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": POSITIONS,
        **_ends(tokenizer),
    }


def _ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return Qwen3Config(**_sizes(tokenizer), head_dim=WIDTH // HEADS, tie_word_embeddings=True)


def _qwen2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return Qwen2Config(**_sizes(tokenizer), tie_word_embeddings=True)


def _llama3_2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return LlamaConfig(**_sizes(tokenizer), tie_word_embeddings=True)


def _llama3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return LlamaConfig(**_sizes(tokenizer), tie_word_embeddings=False)


def _gpt2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        **_ends(tokenizer),
    )


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|finetune_right_pad_id|>"),
)
_LLAMA_INSTRUCT = (_LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", LLAMA3)
FAMILIES: dict[str, StandInFamily] = {
    # name -> configuration, special tokens, bos, eos, pad, chat template, as in the real tokenizer
    "qwen3": StandInFamily(_qwen3, _QWEN, None, "<|endoftext|>", "<|endoftext|>", CHATML),
    "qwen2_5": StandInFamily(_qwen2, _QWEN, None, "<|im_end|>", "<|endoftext|>", CHATML),
    "llama3_2": StandInFamily(_llama3_2, *_LLAMA_INSTRUCT),
    "llama3": StandInFamily(_llama3, *_LLAMA_INSTRUCT),
    "gpt2": StandInFamily(_gpt2, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", None, None),
}
