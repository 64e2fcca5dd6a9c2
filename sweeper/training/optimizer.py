"""The one optimiser transformers does not build by itself, LoRA+, and what 8-bit ones leave behind."""

from __future__ import annotations

import torch
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim import GlobalOptimManager
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments


def loraplus_optimizer(
    model: PeftModel, arguments: TrainingArguments, ratio: float
) -> torch.optim.Optimizer:
    """The configured optimiser with LoRA's B matrices learning `ratio` times as fast as its A's.

    By PEFT's choice so do all vectors (DoRA's magnitudes, trained biases).

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


def forget_states() -> int:
    """Let bitsandbytes forget the weights and states of a trial's optimizer.

    It remembers them for the life of the process. Which weights have 32-bit states (transformers has it
    keep embeddings so wide) goes by their place in the optimizer: others in that place would get them
    in a later trial. States of paged optimizers would be fetched to the GPU at each of its steps.

    Returns:
        Bytes of pages that stay allocated: bitsandbytes has no call that frees them.
    """
    GlobalOptimManager.get_instance().initialize()
    pages = GlobalPageManager.get_instance()
    lost: int = sum(page.nbytes for page in pages.paged_tensors)
    pages.initialize()
    return lost
