"""Which classes with a known output head train without padding, and why not the others?

Each class has its default configuration without attention dropout, reduced by the proof itself.
"""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.record import record
from sweeper.evaluation.chunked_head import FINISHES
from sweeper.modeling.padding_proof import prove

DROPOUTS = ("attention_dropout", "attn_pdrop")
EXACT = "exact"


def result(name: str) -> str:
    """Return EXACT, or the reason why a class of transformers needs padded batches."""
    kinds = {
        model.__name__: config
        for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()
        if isinstance(model, type)
    }
    config = kinds[name]()
    for dropout in DROPOUTS:
        if getattr(config, dropout, None):
            setattr(config, dropout, 0.0)
    if getattr(config, "head_dim", 0) is None:  # a checkpoint of Ministral names it
        config.head_dim = config.hidden_size // config.num_attention_heads
    return prove(config) or EXACT


def main() -> None:
    """Prove every class and record the reasons."""
    results = {name: result(name) for name in sorted(FINISHES)}
    exact = sum(found == EXACT for found in results.values())
    record("padding_free_classes", {"exact": exact, "classes": len(results), "results": results})


if __name__ == "__main__":
    main()
