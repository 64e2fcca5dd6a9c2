"""What does a real token cost on a 134M-parameter shape, in padded batches and without padding?

CPU seconds of one thread for LoRA steps and for judging, on rows of 30 to 400 tokens and random weights.
The plain script pads and computes the loss in the model's own forward. Both sides run in turn, after a
step of each that is not counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import record
from sweeper.data.padding_free import PaddingFreeCollator
from sweeper.data.tokens import IGNORED, PaddingCollator, Tokens
from sweeper.evaluation.token_loss import evaluate_examples, target_nll
from sweeper.modeling.padding_proof import confine_to_rows

SHAPE = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    **{"max_position_embeddings": 2048, "tie_word_embeddings": True},
}
"""The shape of SmolLM2-135M."""
BATCH = 8
ROUNDS = 2
SHORTEST, LONGEST = 30, 400


def rows(seed: int) -> list[Tokens]:
    """Return a batch of random rows, of which the second half of each is the target."""
    chance = random.Random(seed)
    found = []
    for length in (chance.randint(SHORTEST, LONGEST) for _ in range(BATCH)):
        ids = [chance.randrange(3, 49152) for _ in range(length)]
        half = length // 2
        found.append({"input_ids": ids, "labels": [IGNORED] * half + ids[half:]})
    return found


def models() -> dict[str, Any]:
    """Return the same random model with the same adapter, for each side."""
    sides = {}
    for name in ("plain padded", "without padding"):
        torch.manual_seed(0)
        base = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="sdpa")
        if name == "without padding":
            confine_to_rows(base)
        config = LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0)
        sides[name] = get_peft_model(base, config).train()
    return sides


def plain_step(model: Any, batch: list[Tokens]) -> float:
    """Train on a padded batch with the model's own loss."""
    loss = model(**PaddingCollator(0)(batch), use_cache=False).loss
    loss.backward()
    return float(loss)


def own_step(model: Any, batch: list[Tokens]) -> float:
    """Train on the same rows as a trial does."""
    collated = PaddingFreeCollator()(batch)
    loss = target_nll(model, collated) / (collated["labels"] != IGNORED).sum()
    loss.backward()
    return float(loss)


def plain_judging(model: Any, batch: list[Tokens]) -> float:
    """Judge a padded batch with the model's own loss."""
    with torch.no_grad():
        return float(model(**PaddingCollator(0)(batch), use_cache=False).loss)


def own_judging(model: Any, batch: list[Tokens]) -> float:
    """Judge the same rows as a trial does."""
    losses = evaluate_examples(model, batch, PaddingFreeCollator(), BATCH)
    return sum(one.nll for one in losses) / sum(one.tokens for one in losses)


WORK: dict[str, dict[str, Callable[[Any, list[Tokens]], float]]] = {
    "plain padded": {"training": plain_step, "judging": plain_judging},
    "without padding": {"training": own_step, "judging": own_judging},
}


def main() -> None:
    """Run both sides alternately."""
    torch.set_num_threads(1)
    sides = models()
    seconds: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in WORK[name]} for name in sides
    }
    losses: dict[str, list[float]] = {name: [] for name in sides}
    tokens, padded = 0, 0
    for turn in range(ROUNDS + 1):
        batch = rows(turn)
        lengths = [len(row["input_ids"]) for row in batch]
        tokens, padded = tokens + sum(lengths), padded + BATCH * max(lengths)
        for name, model in sides.items():
            for kind, work in WORK[name].items():
                begun = time.process_time()
                losses[name].append(work(model, batch))
                spent = (time.process_time() - begun) / sum(lengths)
                if turn:
                    seconds[name][kind].append(spent)
            model.zero_grad()
    medians = {
        name: {kind: statistics.median(found) for kind, found in kinds.items()}
        for name, kinds in seconds.items()
    }
    plain, own = medians.values()
    pairs = zip(*losses.values(), strict=True)
    record(
        "padding_large_shape",
        {
            "parameters": sum(
                p.numel() for p in sides["plain padded"].get_base_model().parameters()
            ),
            "positions per real token in padded batches": round(padded / tokens, 2),
            "CPU milliseconds per real token": {
                name: {kind: round(1000 * found, 2) for kind, found in kinds.items()}
                for name, kinds in medians.items()
            },
            "ratio": {kind: round(plain[kind] / own[kind], 2) for kind in plain},
            "judging / training, per token": {
                name: round(kinds["judging"] / kinds["training"], 2)
                for name, kinds in medians.items()
            },
            "largest relative difference of losses": max(abs(a - b) / a for a, b in pairs),
        },
    )


if __name__ == "__main__":
    main()
