"""Prove that a model computes packed rows as it computes them alone, or refuse to pack.

transformers finds the rows of a pack by their positions and builds an attention mask for them. Some
model classes ignore the positions, so a small model of the same class trains one step on packs in
float64, with and without recomputed activations. Loss and gradients must be those of single rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sweeper.core.errors import ModelError
from sweeper.data.packing import PackedCollator, pack
from sweeper.data.padding_free import ROW_ATTENTION
from sweeper.data.tokens import PaddingCollator
from sweeper.modeling.reduced_model import VOCABULARY, WINDOW
from sweeper.modeling.row_attention import UnsupportedAttention
from sweeper.modeling.step_proof import StepProof, obstacle, proof_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACK = 24
"""Tokens of a pack in the proof. The rows make two packs of different lengths, one of them padded."""
PROBE_TOKENS = (WINDOW // 2, 4 * WINDOW)
"""Lengths in tokens of the two sequences that are packed for an attention without float64."""
LEAK_SHARE = 0.2
"""Largest tolerated change of the logits, relative to a sequence that does attend to its neighbour.

The value is above the rounding noise of bfloat16 and far below a real leak (1).
"""


def require_isolation(model: PreTrainedModel) -> None:
    """Check that packed rows have the losses and gradients that they have alone.

    torch's random state and the model are unchanged.

    Raises:
        ModelError: They differ, so packed examples would attend to each other, or there is no proof.
    """
    reason = packing_obstacle(model)
    if reason is not None:
        raise ModelError(
            f"data.packing=true: {type(model).__name__} with "
            f"{model.config._attn_implementation} attention may let packed examples attend to each "
            f"other ({reason}). Use data.packing=false."
        )


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a loaded model cannot train on packs, or None if the proof succeeds."""
    attention = model.config._attn_implementation
    if attention == ROW_ATTENTION:  # its packs are taken apart, which was proven when it was loaded
        return None
    if "flash" not in attention:
        return obstacle(model.config, attention, _require_equal_packs)

    def require(small: PreTrainedModel) -> None:
        _require_equal_logits(small.to(model.device))

    return obstacle(model.config, attention, require, torch.bfloat16)


def _require_equal_packs(small: PreTrainedModel) -> None:
    """Compare the small model's losses and gradients on packs with those of single rows.

    Raises:
        UnsupportedAttention: They differ.
    """
    rows, collate = proof_rows(), PaddingCollator(0)
    packs = PackedCollator(0)(pack(rows, PACK))
    # Padding longer than a window gives NaN with eager attention in float64, so rows of similar length
    # share a batch: a position whose window has only padding has no probabilities
    *others, third, fourth = rows
    reordered = [collate([fourth, third]), *(collate([row]) for row in others)]
    proof = StepProof(small, [collate([row]) for row in rows], reordered)
    proof.require_equal(packs)
    proof.require_equal_recomputed(packs)


@torch.no_grad()
def _require_equal_logits(small: PreTrainedModel) -> None:
    """Compare a packed sequence's logits with those that it has alone.

    Flash attention has no float64, and its rounding hides small differences of gradients.

    Raises:
        UnsupportedAttention: The logits differ as if the sequence attended to its neighbour.
    """
    small.eval()
    first, second = PROBE_TOKENS
    # 7 and the size of the vocabulary have no common divisor, so neighbours are different tokens
    ids = torch.arange(first + second, device=small.device)[None] * 7 % VOCABULARY
    restarting = torch.cat([torch.arange(first), torch.arange(second)])[None].to(small.device)

    def logits(**given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = small(**given, use_cache=False).logits[:, -second:].float()
        return found

    shown = torch.ones_like(ids)
    alone = logits(input_ids=ids[:, first:], attention_mask=shown[:, first:])
    packed = logits(input_ids=ids, position_ids=restarting)
    reading = logits(input_ids=ids, attention_mask=shown)
    share = float((packed - alone).abs().max() / (reading - alone).abs().max())
    if not share <= LEAK_SHARE:  # also if it is not a number
        raise UnsupportedAttention(f"its rows are not independent (relative error {share:.1e})")
