"""Prove that a model computes batches without padding as it computes padded ones, or say why not.

The proof trains a small model of the same class for one step in float64, with and without recomputed
activations, on rows that are longer than its attention windows. Loss and gradients must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sweeper.data.padding_free import ROW_ATTENTION, PaddingFreeCollator
from sweeper.data.tokens import PaddingCollator
from sweeper.modeling.row_attention import UnsupportedAttention
from sweeper.modeling.step_proof import StepProof, inputs, obstacle, proof_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_proven: dict[tuple[type, str], str | None] = {}
"""Results of this process, by class and configuration."""


def padding_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a loaded model needs padded batches, or None if the proof succeeds.

    Later calls with the same configuration return the first result. torch's random state is unchanged.
    """
    reason = _configured_obstacle(model)
    if reason is not None:
        return reason
    key = (type(model), model.config.to_json_string())
    if key not in _proven:
        _proven[key] = prove(model.config)
    return _proven[key]


def _configured_obstacle(model: PreTrainedModel) -> str | None:
    # The other path has been measured on CPUs only
    if model.device.type != "cpu":
        return f"batches on a device of type {model.device.type} are padded"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    # bitsandbytes decides over a whole batch which columns have outliers, so padding changes them
    if getattr(model, "is_loaded_in_8bit", False):
        return "its 8-bit layers treat outliers of a whole batch alike"
    return None


def prove(config: PretrainedConfig) -> str | None:
    """Return None if a small model of this configuration is exact without padding, else the reason.

    Args:
        config: Configuration of the model at its full size.
    """
    return obstacle(config, "sdpa", _require_equal)


def _require_equal(model: PreTrainedModel) -> None:
    """Compare the model's losses and gradients with those of padded batches.

    Raises:
        UnsupportedAttention: They differ, or the model's attention cannot be confined to rows.
    """
    rows = proof_rows()
    flat, padded = PaddingFreeCollator()(rows), PaddingCollator(0)(rows)
    model.train()
    with _row_attention(model), torch.no_grad():
        model(**inputs(flat), use_cache=False)  # raises if attention weights are dropped at random
    proof = StepProof(model, [padded], [PaddingCollator(0)(rows[::-1])])
    with _row_attention(model):
        proof.require_equal(flat)
        # Answers are generated from padded batches by the same model
        proof.require_equal(padded, "in padded batches ")
        proof.require_equal_recomputed(flat)


@contextmanager
def _row_attention(model: PreTrainedModel) -> Iterator[None]:
    confine_to_rows(model)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def confine_to_rows(model: PreTrainedModel) -> None:
    """Let a model take batches without padding. Padded batches and generation stay possible.

    Raises:
        UnsupportedAttention: transformers cannot replace the attention of this class.
    """
    model.set_attn_implementation(ROW_ATTENTION)
    if model.config._attn_implementation != ROW_ATTENTION:
        raise UnsupportedAttention("transformers cannot replace its attention")
