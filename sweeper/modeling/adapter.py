"""Put an adapter on a loaded base, take it off again, and count what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers.pytorch_utils import Conv1D

from sweeper.config.settings import LoraAdapter, NoAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.model_source import one_line
from sweeper.modeling.target_modules import require_matches, resolve_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OLORA_ON_CONV1D = (
    "adapter.init_lora_weights=olora does not know this architecture's transposed weights (Conv1D); "
    "choose default or gaussian, or an NF4 base"
)


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
        ModelError: target_modules, modules_to_save or a pattern matches nothing in this model, or this
            architecture cannot be initialised that way.
    """
    config = lora_config(model, settings)
    try:
        adapted = get_peft_model(model, config)
    except (
        ValueError
    ) as error:  # PEFT's word for a combination of options that leaves nothing to adapt
        raise ModelError(one_line("adapter", error)) from error
    # PEFT renders a model card into every checkpoint, 45 ms each; the artifact gets a card of ours
    adapted.create_or_update_model_card = _write_no_card
    return adapted


def _write_no_card(output_dir: str) -> None:
    """Leave `output_dir` without PEFT's model card."""


def lora_config(model: PreTrainedModel, settings: LoraAdapter) -> LoraConfig:
    """PEFT's configuration for this adapter on this model.

    Raises:
        ModelError: as `attach`.
    """
    names = linear_modules(model)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if transposed and settings.init_lora_weights == "olora":
        raise ModelError(OLORA_ON_CONV1D)
    require_matches("rank_pattern", list(settings.rank_pattern), names)
    require_matches("alpha_pattern", list(settings.alpha_pattern), names)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=resolve_targets(
            settings.target_modules, names, settings.layers_to_transform
        ),
        modules_to_save=settings.modules_to_save or None,
        ensure_weight_tying=_saves_tied_embeddings(model, settings.modules_to_save),
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights == "default" or settings.init_lora_weights,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=settings.alphas,
        fan_in_fan_out=transposed,
    )


def touches_base(settings: LoraAdapter | NoAdapter) -> bool:
    """Whether training this adapter changes the base's own weights, so that it must be loaded anew.

    Everything else comes off again without a trace; modules_to_save trains copies.
    """
    if isinstance(settings, NoAdapter):
        return True
    return settings.bias != "none" or settings.init_lora_weights == "olora"


def detach(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off: the very base that `attach` was given, unmerged.

    For an adapter that `touches_base` it is that object, but not those weights. Recomputed activations
    are switched off: transformers' Trainer only ever switches them on.
    """
    base: PreTrainedModel = model.get_base_model()
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model.unload()
    for name, module in originals.items():  # PEFT's unload leaves the trained copies in place
        base.set_submodule(name, module)
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


def _saves_tied_embeddings(model: PreTrainedModel, modules_to_save: list[str]) -> bool:
    """Whether PEFT must keep the trained embedding and the trained head one tensor.

    Without that the head's training is lost in a merge.
    """
    modules = dict(model.named_modules())
    found = {
        wanted: [name for name in modules if name == wanted or name.endswith("." + wanted)]
        for wanted in modules_to_save
    }
    if missing := [wanted for wanted, names in found.items() if not names]:
        known = sorted({name.rsplit(".", 1)[-1] for name in modules} - {""})
        raise ModelError(
            f"adapter.modules_to_save={modules_to_save}: the model has no module named "
            f"{', '.join(missing)}; its modules are {', '.join(known)}"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    tied = [
        name for names in found.values() for name in names if modules[name] in (head, embedding)
    ]
    if any(name.rsplit(".", 1)[-1] not in EMBEDDING_LAYER_NAMES for name in tied):
        raise ModelError(
            f"adapter.modules_to_save={modules_to_save}: this architecture ties its embedding to its "
            f"head, and PEFT can keep them tied only where they are named "
            f"{' and '.join(EMBEDDING_LAYER_NAMES)}; leave {', '.join(tied)} out"
        )
    return bool(tied)
