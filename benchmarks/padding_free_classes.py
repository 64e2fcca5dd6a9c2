"""Which classes with a known output head train without padding, and why not the others?

Each class has its default configuration without attention dropout, reduced by the proof itself.
"""

from __future__ import annotations

from record import record
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sweeper.evaluation.chunked_head import FINISHES
from sweeper.modeling.padding_proof import prove

DROPOUTS = ("attention_dropout", "attn_pdrop")


def main() -> None:
    """Prove every class and record the reasons."""
    configs = {
        model.__name__: config
        for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()
        if isinstance(model, type)
    }
    reasons = {}
    for name in sorted(FINISHES):
        config = configs[name]()
        for dropout in DROPOUTS:
            if getattr(config, dropout, None):
                setattr(config, dropout, 0.0)
        if getattr(config, "head_dim", 0) is None:  # a checkpoint of Ministral names it
            config.head_dim = config.hidden_size // config.num_attention_heads
        reasons[name] = prove(config) or "exact"
    exact = sum(reason == "exact" for reason in reasons.values())
    record("padding_free_classes", {"exact": exact, "classes": len(reasons), "result": reasons})


if __name__ == "__main__":
    main()
