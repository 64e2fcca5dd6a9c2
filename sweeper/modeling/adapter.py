"""Attach an adapter to a loaded base, detach it again, and count parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers.pytorch_utils import Conv1D

from sweeper.config.settings import LoraAdapter, NoAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.expert_weights import computes_otherwise, expert_weights, hidden_weights
from sweeper.modeling.frozen_linear import fuse_frozen_linears
from sweeper.modeling.model_source import one_line
from sweeper.modeling.portable_targets import make_portable, names_as_given, open_adapter
from sweeper.modeling.target_modules import (
    Role,
    equal_presets,
    reached,
    require_matches,
    resolve_targets,
    role_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OLORA_ON_CONV1D = (
    "adapter.init_lora_weights=olora does not support this architecture's transposed weights (Conv1D). "
    "Choose default or gaussian, or an NF4 base"
)


# PEFT's check of a target takes a configuration and reads its type only
_ANY_LORA = LoraConfig()


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of a model, where the adapter is part of the total."""

    total: int
    trainable: int

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the total, as PEFT prints them."""
        return 100 * self.trainable / self.total

    @property
    def percent_of_base(self) -> float:
        """Trainable parameters in percent of the base without its adapter."""
        base = self.total - self.trainable
        return 100 * self.trainable / (base or self.total)


def attach(model: PreTrainedModel, settings: LoraAdapter) -> PeftModel:
    """Wrap a base in a new LoRA adapter with fp32 weights, and freeze the base in place.

    The adapter's random initialisation depends on torch's global seed, so set the seed first.

    Raises:
        ModelError: target_modules, modules_to_save or a pattern matches nothing in this model, or the
            initialisation does not support this architecture.
    """
    config = lora_config(model, settings)
    try:
        with names_as_given():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        # PEFT raises ValueError for a combination of options that leaves nothing to adapt
        raise ModelError(one_line("adapter", error)) from error
    make_portable(config, model)
    hold_trained_in_fp32(adapted)
    # PEFT renders a model card into every checkpoint, 45 ms each; the artifact gets a card of ours
    adapted.create_or_update_model_card = _write_no_card
    fuse_frozen_linears(adapted)
    return adapted


def hold_trained_in_fp32(model: torch.nn.Module) -> None:
    """Convert every trainable weight to fp32.

    PEFT converts the weights of LoRA only. Copies of modules_to_save and trained biases would keep the
    base's dtype, in which most steps of an optimizer are too small to change a weight.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)  # tied copies share the parameter
    assert trained_dtypes(model) <= {torch.float32}, "an optimizer would round its steps"


def trained_dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    """Return the dtypes of a model's trainable weights."""
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


def load_adapter(model: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """Load a stored adapter onto its base with the precision of its training."""
    adapted = open_adapter(model, folder, name)
    restore_precision(adapted, folder, name)
    fuse_frozen_linears(adapted)
    return adapted


def restore_precision(model: PeftModel, folder: Path, name: str) -> None:
    """Load the weights that an adapter replaces again in fp32.

    PEFT rounds stored copies of modules_to_save and biases to the base's dtype.

    Args:
        model: a base with the adapter.
        folder: the stored adapter.
        name: the adapter's name in the model.
    """
    whole = _replaced(model, name)
    if all(parameter.dtype == torch.float32 for parameter in whole):
        return
    for parameter in whole:
        parameter.data = parameter.data.to(torch.float32)
    weights = load_peft_weights(str(folder), device=str(model.device))
    set_peft_model_state_dict(model, weights, adapter_name=name)


def _replaced(model: PeftModel, name: str) -> list[torch.nn.Parameter]:
    """Return the weights that an adapter replaces: copies of modules_to_save, and trained biases."""
    copies = [
        parameter
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for parameter in module.modules_to_save[name].parameters()
    ]
    bias = model.peft_config[name].bias
    if bias == "none":
        return copies
    layers = model.modules() if bias == "all" else _adapted_layers(model)
    found = (getattr(layer, "bias", None) for layer in layers)
    return [*copies, *(each for each in found if isinstance(each, torch.nn.Parameter))]


def _adapted_layers(model: PeftModel) -> list[torch.nn.Module]:
    return [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]


def _write_no_card(output_dir: str) -> None:
    """Leave `output_dir` without PEFT's model card."""


def lora_config(model: PreTrainedModel, settings: LoraAdapter) -> LoraConfig:
    """Return PEFT's configuration for this adapter on this model.

    Raises:
        ModelError: see `attach`.
    """
    # PEFT ignores patterns and modules that match nothing, so the names are checked here
    experts = expert_weights(model)
    names = [*linear_modules(model), *experts]
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if transposed and settings.init_lora_weights == "olora":
        raise ModelError(OLORA_ON_CONV1D)
    require_matches("rank_pattern", list(settings.rank_pattern), names)
    require_matches("alpha_pattern", list(settings.alpha_pattern), names)
    modules: str | list[str] = resolve_targets(
        settings.target_modules, names, settings.layers_to_transform, module_roles(model, names)
    )
    stacked: list[str] = []
    # PEFT's own all-linear has layers that are left out here
    if experts or len(names) < len(_linear_layers(model)):
        wanted = reached(modules, names)
        stacked = [name for name in experts if name in wanted]
        modules = [name for name in wanted if name not in stacked]
    if stacked:
        _require_options_of_experts(settings, stacked[0])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules,
        target_parameters=stacked or None,
        modules_to_save=settings.modules_to_save or None,
        ensure_weight_tying=_saves_tied_embeddings(model, settings.modules_to_save),
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        # PEFT's True is its default initialisation
        init_lora_weights=settings.init_lora_weights == "default" or settings.init_lora_weights,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=settings.alphas,
        # Conv1D stores its weights transposed
        fan_in_fan_out=transposed,
    )


def _require_options_of_experts(settings: LoraAdapter, example: str) -> None:
    """Refuse options that PEFT cannot apply to the stacked weights of experts."""
    wrong = {
        f"adapter.lora_dropout={settings.lora_dropout}": settings.lora_dropout > 0,
        "adapter.use_dora=true": settings.use_dora,
        "adapter.init_lora_weights=olora": settings.init_lora_weights == "olora",
    }
    if refused := [text for text, used in wrong.items() if used]:
        raise ModelError(
            f"{', '.join(refused)}: not possible on the stacked weights of experts ({example}). Set the "
            "default, or leave the experts out: adapter.target_modules=attention"
        )


def module_roles(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Role]:
    """Return the role of each linear weight, from the names and classes of what it is part of."""
    classes = {name: type(module).__name__.lower() for name, module in model.named_modules()}

    def path(name: str) -> list[str]:
        parts = name.split(".")
        prefixes = (".".join(parts[: n + 1]) for n in range(len(parts)))
        return [
            f"{part.lower()} {classes.get(prefix, '')}".strip()
            for part, prefix in zip(parts, prefixes, strict=True)
        ]

    return {name: role_of(path(name)) for name in names}


def equal_presets_of(model: PreTrainedModel) -> dict[str, str]:
    """Return the presets that adapt the same weights of a model as another one. See `equal_presets`."""
    names = [*linear_modules(model), *expert_weights(model)]
    return equal_presets(names, module_roles(model, names))


def touches_base(settings: LoraAdapter | NoAdapter) -> bool:
    """Return True if training this adapter changes the base's own weights, so it must be reloaded."""
    # Biases are trained in place and OLoRA subtracts its initial product from the base. All else is
    # separate from the base: modules_to_save trains copies
    if isinstance(settings, NoAdapter):
        return True
    return settings.bias != "none" or settings.init_lora_weights == "olora"


def detach(model: PeftModel) -> PreTrainedModel:
    """Remove the adapter and return the base object that was given to `attach`, unmerged.

    The base's weights are unchanged unless the adapter `touches_base`.
    """
    base: PreTrainedModel = model.get_base_model()
    # transformers' Trainer switches activation checkpointing on but never off
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model.unload()
    for name, module in originals.items():
        # PEFT's unload leaves the trained copies of modules_to_save in the base
        base.set_submodule(name, module)
    # With it PEFT would warn that the next adapter is a second one
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Return the full names of the modules LoRA can target: all linear layers but the output head.

    Left out are classes that compute something else (routers, DeepSeek-V4's grouped product), and what
    PEFT refuses, because the model reads the weight itself (Mamba's out_proj).
    """
    return [
        name
        for name, module in _linear_layers(model).items()
        if not computes_otherwise(type(module)) and not _refused_by_peft(model, name)
    ]


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        # Conv1D is GPT-2's linear layer, whose weights are transposed
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def _refused_by_peft(model: PreTrainedModel, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(_ANY_LORA, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def describe_reach(model: PeftModel) -> str:
    """Return which kinds of linear weights an adapter reaches, and which it does not, with counts."""
    base = model.get_base_model()
    adapted = {_plain(name) for name, part in base.named_modules() if isinstance(part, LoraLayer)}
    stacked = {_plain(name) for name in model.base_model.targeted_parameter_names}
    names = [*linear_modules(base), *expert_weights(base)]
    own = dict.fromkeys(_plain(name) for name in names if ".lora_" not in name)
    found = [name for name in own if name in adapted | stacked]
    missed = [name for name in own if name not in found]
    words = f"on {_kinds(found)}"
    return f"{words}; not on {_kinds(missed)}" if missed else words


def _kinds(names: Sequence[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{kind} ×{count}" for kind, count in counts.items())


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def modules_without_gradient(model: PeftModel) -> list[str]:
    """Return the adapted modules that the backward pass did not reach."""
    # B starts at zero, so the gradient of A is zero in the first step, and that of B is not
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return [
        _plain(name).partition(".lora_B")[0].removeprefix("base_model.model.")
        for name, weight in weights.items()
        if ".lora_B." in name and (weight.grad is None or not weight.grad.any())
    ]


def count_parameters(model: PreTrainedModel | PeftModel) -> ParameterCount:
    """Count all parameters and the trainable ones. Packed 4-bit weights count unpacked."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return ParameterCount(total + hidden_weights(model), trainable)
    total = int(model.num_parameters()) + hidden_weights(model)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return ParameterCount(total, trainable)


def _saves_tied_embeddings(model: PreTrainedModel, modules_to_save: list[str]) -> bool:
    """Return True if PEFT must keep the trained embedding and the trained head tied.

    Raises:
        ModelError: a module does not exist, or PEFT cannot keep the two tied under their names.
    """
    # Untied, the head's training would be lost in a merge, where the base ties both again
    modules = dict(model.named_modules())
    found = {
        wanted: [name for name in modules if name == wanted or name.endswith("." + wanted)]
        for wanted in modules_to_save
    }
    if missing := [wanted for wanted, names in found.items() if not names]:
        known = sorted({name.rsplit(".", 1)[-1] for name in modules} - {""})
        raise ModelError(
            f"adapter.modules_to_save={modules_to_save}: the model has no module named "
            f"{', '.join(missing)}. Its modules are {', '.join(known)}"
        )
    # Embedding and head may be one tensor. PEFT then trains two copies unless told to tie them
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    tied = [
        name for names in found.values() for name in names if modules[name] in (head, embedding)
    ]
    if any(name.rsplit(".", 1)[-1] not in EMBEDDING_LAYER_NAMES for name in tied):
        raise ModelError(
            f"adapter.modules_to_save={modules_to_save}: this architecture ties its embedding to its "
            f"head, and PEFT can keep them tied only if they are named "
            f"{' and '.join(EMBEDDING_LAYER_NAMES)}. Leave {', '.join(tied)} out"
        )
    return bool(tied)
