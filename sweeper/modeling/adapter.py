"""Put an adapter on a loaded base, take it off again, and count what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from sweeper.modeling.targets import resolve_targets
from sweeper.settings import LoraAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model as trained: the adapter is part of the total."""

    total: int
    trainable: int

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the total, PEFT's way."""
        return 100 * self.trainable / self.total

    @property
    def percent_of_base(self) -> float:
        """Trainable parameters in percent of the base without its adapter."""
        base = self.total - self.trainable
        return 100 * self.trainable / (base or self.total)


def attach(model: PreTrainedModel, settings: LoraAdapter) -> PeftModel:
    """Wrap a base in a fresh LoRA adapter (fp32 weights); the base is frozen in place.

    The adapter's random initialisation follows torch's global seed: set it first.

    Raises:
        ModelError: target_modules matches nothing in this model.
    """
    names = linear_modules(model)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=resolve_targets(settings.target_modules, names),
            bias=settings.bias,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        ),
    )


def detach(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off: the very base that `attach` was given, unmerged."""
    base: PreTrainedModel = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules LoRA can target: every linear map but the output head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def count_parameters(model: PreTrainedModel | PeftModel) -> ParameterCount:
    """Count what is there and what is trained; packed 4-bit weights count as what they stand for."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return ParameterCount(total, trainable)
    total = int(model.num_parameters())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return ParameterCount(total, trainable)
