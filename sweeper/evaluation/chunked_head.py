"""What stands between a model's hidden states and its logits, so that the head can be applied in parts.

Knows how transformers' causal language models end; knows nothing of losses. A class that is not named
here keeps its own forward: its logits are asked for at the wanted positions and exist whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

Head = Callable[[Tensor], Tensor]
"""States [n, hidden] into logits [n, vocabulary]."""

Finish = Callable[[Tensor, Any], Tensor]
"""What a model does to the logits of its linear head, given its config."""


def _plain(logits: Tensor, _: Any) -> Tensor:
    return logits


def _soft_capped(logits: Tensor, config: Any) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _multiplied(logits: Tensor, config: Any) -> Tensor:
    scale: float = config.logit_scale
    return logits * scale


def _divided(logits: Tensor, config: Any) -> Tensor:
    scale: float = config.logits_scaling
    return logits / scale


FINISHES: dict[str, Finish] = {
    **dict.fromkeys(
        (
            *("ApertusForCausalLM", "ArceeForCausalLM", "BloomForCausalLM", "Ernie4_5ForCausalLM"),
            *(
                "Exaone4ForCausalLM",
                "FalconForCausalLM",
                "GPT2LMHeadModel",
                "GPTBigCodeForCausalLM",
            ),
            *("GPTJForCausalLM", "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "GemmaForCausalLM"),
            *("Glm4ForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "HeliumForCausalLM"),
            *("LlamaForCausalLM", "Ministral3ForCausalLM", "MinistralForCausalLM"),
            *("MistralForCausalLM", "MixtralForCausalLM", "MptForCausalLM", "OPTForCausalLM"),
            *("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "Phi3ForCausalLM"),
            *("PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM"),
            *("Qwen3MoeForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM"),
            *("StableLmForCausalLM", "Starcoder2ForCausalLM"),
        ),
        _plain,
    ),
    **dict.fromkeys(
        ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "VaultGemmaForCausalLM"), _soft_capped
    ),
    **dict.fromkeys(("Cohere2ForCausalLM", "CohereForCausalLM"), _multiplied),
    **dict.fromkeys(("GraniteForCausalLM", "GraniteMoeForCausalLM"), _divided),
}
"""transformers' classes with logits = finish(lm_head(last hidden state)); a test reads their source."""


def states_at(
    model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor
) -> tuple[Tensor, Head]:
    """The states at some positions, and the head that turns them into logits.

    For a class without an entry in FINISHES the states are its logits already and the head is the
    identity. The body is called without the model's own forward, so what is wrapped around that forward
    (accelerate's autocast) does not reach it: callers autocast themselves.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        inputs: what its forward takes (`input_ids`, `attention_mask`, …), each [batch, length].
        positions: boolean [batch, length].

    Returns:
        States [positions.sum(), hidden], rows first, and the head.
    """
    base = _unwrapped(model)
    finish = FINISHES.get(_architecture(base) or "")
    if finish is None:
        return _logits_at(model, inputs, positions), _identity
    states = base.base_model(**inputs, use_cache=False).last_hidden_state[positions]
    output = base.get_output_embeddings()  # with PEFT's layers around it, where it has any
    return states, lambda part: finish(output(part), base.config)


def _logits_at(model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    base = _unwrapped(model)
    if _architecture(base):  # since 5.23 a mask selects positions of each row
        logits: Tensor = model(**inputs, logits_to_keep=positions, use_cache=False).logits
        return logits
    whole: Tensor = model(**inputs, use_cache=False).logits
    return whole[positions]


def _unwrapped(model: nn.Module) -> Any:
    """transformers' model itself; PEFT's layers are inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _architecture(base: nn.Module) -> str | None:
    """The name of transformers' class; None for code from a model's own repository.

    That may end otherwise under the same name. FSDP derives a class from itself and the model's.
    """
    derived = type(base).__mro__
    own = derived[2] if isinstance(base, FSDPModule) else derived[0]
    return own.__name__ if own.__module__.startswith("transformers.models.") else None


def _identity(logits: Tensor) -> Tensor:
    return logits
