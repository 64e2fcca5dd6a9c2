"""Small models of real architectures, randomly initialised, for tests of this folder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from sweeper.builtin.embedded import BASE_DIR

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 128}
GROUPED = {**SIZE, **HEADS, "num_key_value_heads": 1}


class FreshConfigs(dict[str, PretrainedConfig]):
    """Configurations that are copied when they are taken, because models write into theirs."""

    def __getitem__(self, name: str) -> PretrainedConfig:
        """Return a copy of a configuration."""
        return copy.deepcopy(super().__getitem__(name))


CONFIGS = FreshConfigs(
    {
        "llama": LlamaConfig(**GROUPED),
        "qwen2": Qwen2Config(**GROUPED),
        "qwen3": Qwen3Config(**GROUPED, head_dim=32),
        "mistral": MistralConfig(**GROUPED),
        "gemma2": Gemma2Config(**GROUPED, head_dim=32),
        "phi": PhiConfig(**SIZE, **HEADS),
        "phi3": Phi3Config(**GROUPED, pad_token_id=0),
        "gpt2": GPT2Config(vocab_size=2048, n_embd=64, n_layer=2, n_head=2, n_positions=128),
        "gpt_neox": GPTNeoXConfig(**SIZE, **HEADS),
        "falcon": FalconConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2, **HEADS),
        "gptj": GPTJConfig(
            vocab_size=2048, n_embd=64, n_layer=2, n_head=2, n_positions=128, rotary_dim=8
        ),
        "opt": OPTConfig(
            vocab_size=2048,
            hidden_size=64,
            ffn_dim=128,
            word_embed_proj_dim=64,
            **{
                "num_hidden_layers": 2,
                **HEADS,
            },
        ),
    }
)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The architecture without storage."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def save(config: PretrainedConfig, folder: Path) -> Path:
    """A random model of the architecture and the embedded tokenizer, as a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)
    return folder
