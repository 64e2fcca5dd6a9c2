"""Choose the optimiser's form, build that of LoRA+, and clear bitsandbytes' global state."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim import GlobalOptimManager
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments


def optimizer_class(
    arguments: TrainingArguments, model: torch.nn.Module | None
) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options of the configured optimiser, with torch's fused AdamW on CPUs.

    Args:
        arguments: names the optimiser.
        model: the model to train.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    # torch's default on CPUs walks over each tensor once per operation: 3.9 instead of 1.3 CPU ms a
    # step of 1.1M weights. Both forms are one algorithm, and differ by rounding
    if kind is torch.optim.AdamW and arguments.device.type == "cpu":
        options["fused"] = True
    return kind, options


def loraplus_optimizer(
    model: PeftModel, arguments: TrainingArguments, ratio: float
) -> torch.optim.Optimizer:
    """Build the configured optimiser with LoRA+ learning rates: `ratio` times higher for B than for A.

    PEFT gives all vectors (DoRA's magnitudes, trained biases) the rate of B as well.

    Args:
        model: the model with its adapter.
        arguments: names the optimiser and the learning rate of the A matrices.
        ratio: learning rate of the B matrices divided by that of the A matrices.

    Source: Hayou et al. 2024, LoRA+ (arXiv:2402.12354).
    """
    kind, options = optimizer_class(arguments, model)
    # PEFT sets the rates of both groups itself
    options.pop("lr")
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        kind,
        lr=arguments.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
    return optimizer


def forget_states() -> int:
    """Clear the weights and states that bitsandbytes keeps globally for a trial's optimizer.

    bitsandbytes would keep them for the life of the process.

    Returns:
        Bytes of pages that stay allocated, because bitsandbytes has no call that frees them.
    """
    # bitsandbytes identifies weights with 32-bit states (transformers asks for them on embeddings) by
    # position in the optimizer, so the weights of a later trial in that position would get them too
    GlobalOptimManager.get_instance().initialize()
    # Every step of a later trial would prefetch all registered pages to the GPU
    pages = GlobalPageManager.get_instance()
    lost: int = sum(page.nbytes for page in pages.paged_tensors)
    pages.initialize()
    return lost
