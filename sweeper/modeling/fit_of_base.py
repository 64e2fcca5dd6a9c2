"""Check that tokenizer, class and weights of a loaded base model fit each other.

Independent of quantization, adapters and training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sweeper.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OTHER_MEDIA = ("image", "audio", "video", "boi", "eoi", "boa", "eoa")
"""Beginnings of the names of special tokens that stand for pictures and sound, which no text becomes."""
SHOWN = 5
"""Number of tokens that a message names."""
LEAK = 0.005
"""Share of a token's effect on its own logits that may reach earlier ones, by rounding."""


def fit_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, where: str) -> list[str]:
    """Make every token id an index of the embedding, and return remarks on what was changed.

    A padding token beyond the table is replaced by the end token, because padding has no loss.

    Raises:
        ModelError: another token lies beyond the table. The message names these tokens.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= rows}
    remarks = []
    pad = tokenizer.pad_token
    if pad in beyond and tokenizer.eos_token not in beyond:
        tokenizer.pad_token = tokenizer.eos_token
        beyond.discard(pad)
        remarks.append(
            f"the padding token {pad} has no row in the embedding ({rows:,} rows), so "
            f"{tokenizer.eos_token} pads"
        )
    beyond -= _of_other_media(tokenizer)
    if beyond:
        named = ", ".join(sorted(beyond)[:SHOWN])
        more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
        raise ModelError(
            f"{where}: the tokens {named}{more} have no row in the embedding, which has {rows:,}. "
            "The tokenizer belongs to another model, or the embedding was not resized. Use the "
            "tokenizer that was stored with the weights, or call resize_token_embeddings and store "
            "the model again"
        )
    return remarks


def _of_other_media(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    named = tokenizer.special_tokens_map.items()
    return {
        token
        for name, token in named
        if isinstance(token, str) and name.partition("_")[0] in OTHER_MEDIA
    }


@torch.no_grad()
def require_causal(model: PreTrainedModel, where: str) -> None:
    """Check that a token changes no logits before its own position.

    Raises:
        ModelError: the model reads text in both directions, as encoders do. Its loss would be wrong.
    """
    was_training = model.training
    rows = int(model.get_input_embeddings().weight.shape[0])
    # two texts that differ in their last token only
    first, second = ([[1, 2, 1, last]] for last in (1, min(3, rows - 1)))
    model.eval()
    try:
        one, two = (
            model(input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits.float()
            for ids in (first, second)
        )
    finally:
        model.train(was_training)
    change = (one - two).abs()
    own, earlier = float(change[0, -1].max()), float(change[0, :-1].max())
    if earlier > LEAK * own:
        raise ModelError(
            f"{where}: {type(model).__name__} reads text in both directions, so it cannot be trained "
            "to continue text. Choose a causal language model"
        )
