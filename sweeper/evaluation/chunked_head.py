"""Apply a model's output head to chosen positions only, so that the logits can be computed in chunks.

Knows how transformers' causal language models turn hidden states into logits, and nothing of losses. A
class that is not listed in FINISHES runs its own forward, which computes all chosen logits at once.
"""

# At a vocabulary of 128,000 and 2,048 targets, chunks of 256 cut the peak memory of a training step
# from 3,016 to 392 MiB (benchmarks/chunked_cross_entropy.json).

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

Head = Callable[[Tensor], Tensor]
"""Function from hidden states [n, hidden] to logits [n, vocabulary]."""

Finish = Callable[[Tensor, Any], Tensor]
"""Function that a model applies to the logits of its linear head, given its config."""


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
"""Classes of transformers in which logits = finish(lm_head(last hidden state)).

A test checks each entry against the class's source in the installed transformers.
"""


def states_at(
    model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor
) -> tuple[Tensor, Head]:
    """Return the hidden states at the given positions, and the head that turns them into logits.

    For a class without an entry in FINISHES the returned states are already the logits, and the head is
    the identity. The model's own forward is not called, so accelerate's autocast around that forward
    does not apply and callers must autocast.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        inputs: Inputs of the model's forward (`input_ids`, `attention_mask`, …), each [batch, length].
        positions: Boolean mask [batch, length] of the positions to predict from.

    Returns:
        States [positions.sum(), hidden] in row-major order, and the head.
    """
    base = _unwrapped(model)
    finish = FINISHES.get(_architecture(base) or "")
    if finish is None:
        return _logits_at(model, inputs, positions), _identity
    # transformers' logits_to_keep takes the union of the rows' positions. Here each row has its own.
    states = base.base_model(**inputs, use_cache=False).last_hidden_state[positions]
    output = base.get_output_embeddings()  # includes PEFT's layers if the head has an adapter
    return states, lambda part: finish(output(part), base.config)


def _logits_at(model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    base = _unwrapped(model)
    if _architecture(base):  # since transformers 5.23 a mask selects positions of each row
        logits: Tensor = model(**inputs, logits_to_keep=positions, use_cache=False).logits
        return logits
    whole: Tensor = model(**inputs, use_cache=False).logits
    return whole[positions]


def _unwrapped(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model. PEFT's layers stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _architecture(base: nn.Module) -> str | None:
    """Return the name of a transformers class, or None for code from a model's own repository."""
    # Remote code may have a class of the same name with another head. FSDP replaces the model's class
    # by one derived from FSDPModule and the original class.
    derived = type(base).__mro__
    own = derived[2] if isinstance(base, FSDPModule) else derived[0]
    return own.__name__ if own.__module__.startswith("transformers.models.") else None


def _identity(logits: Tensor) -> Tensor:
    return logits
