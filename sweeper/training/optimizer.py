"""The one optimiser transformers does not build by itself, LoRA+, and what 8-bit ones leave behind."""

from __future__ import annotations

import torch
from bitsandbytes.optim import GlobalOptimManager
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments


def loraplus_optimizer(
    model: PeftModel, arguments: TrainingArguments, ratio: float
) -> torch.optim.Optimizer:
    """The configured optimiser with LoRA's B matrices learning `ratio` times as fast as its A's.

    Hayou et al. 2024, arXiv:2402.12354; the learning rate of the settings is that of A.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
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


def forget_overrides() -> None:
    """Let bitsandbytes forget which weights had 32-bit states.

    transformers has it keep those of embeddings so wide. bitsandbytes remembers them by their place
    among an optimizer's weights, for the life of the process: other weights in that place would get
    32-bit states in a later trial, and the embeddings would never be freed.
    """
    GlobalOptimManager.get_instance().initialize()
