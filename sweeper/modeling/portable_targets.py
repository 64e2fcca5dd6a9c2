"""Name the targets of an adapter so that PEFT adapts the same weights here and where it is used.

PEFT reads target names as those of transformers 4, in which experts were separate layers. It rewrites
`shared_expert.gate_proj` to the experts' `gate_up_proj` (PEFT's issue 3711). Within `names_as_given` it
takes names as they are. What is stored names such layers by their weight, which PEFT does not rewrite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft.utils import transformers_weight_conversion as conversion
from torch.nn.utils import parametrize

from sweeper.core.errors import ModelError
from sweeper.modeling.expert_weights import IN_ORDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT = ".weight"


@contextmanager
def names_as_given() -> Iterator[None]:
    """Let PEFT take target names as they are, and nest the wrappers of a module in one order."""
    rewrite, inject = conversion.convert_peft_config_for_transformers, BaseTuner._inject_parameters

    def inject_in_order(tuner: Any, *arguments: Any, **options: Any) -> list[str]:
        names: list[str] = inject(tuner, *arguments, **options)
        nest_by_definition(options["model"])
        return names

    conversion.convert_peft_config_for_transformers = _keep
    BaseTuner._inject_parameters = inject_in_order
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = rewrite
        BaseTuner._inject_parameters = inject


def _keep(config: Any, **_: Any) -> None:
    """Leave a configuration as it is."""


def nest_by_definition(model: torch.nn.Module) -> None:
    """Nest the wrappers of each module in the order of its weights, the first one innermost."""
    # PEFT wraps quantized weights in the order of their names. An adapter's keys follow from the
    # nesting, so its weights would change places on an unquantized base
    outermost = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper) and not name.endswith(".base_layer")
    ]
    for name, module in outermost:
        wrappers = _chain(module)
        base = wrappers[-1].base_layer
        order = _definition(base)
        innermost_first = sorted(wrappers, key=lambda wrapper: order.index(wrapper.parameter_name))
        inner = base
        for wrapper in innermost_first:
            wrapper.base_layer = inner
            if hasattr(base, IN_ORDER):
                wrapper._activate_lora = MethodType(_activate_on_packed, wrapper)
                wrapper._remove_parametrizations = MethodType(_remove_update, wrapper)
            inner = wrapper
        model.set_submodule(name, inner)


@contextmanager
def _activate_on_packed(wrapper: ParamWrapper, adapters: list[str]) -> Iterator[None]:
    """Add the update to a packed weight, as ParamWrapper does, and let no earlier value be reused."""
    # torch keeps computed weights while the outer of two wrappers is active. The inner one reads its
    # weight before it adds its update, so the weight without the update would be used
    with ParamWrapper._activate_lora(wrapper, adapters):
        parametrize._cache.pop((id(wrapper.get_base_layer()), wrapper.parameter_name), None)
        yield


def _remove_update(wrapper: ParamWrapper) -> None:
    """Take the update off a packed weight after a forward pass."""
    # PEFT 0.21 leaves it there, because it looks for another class, so updates would add up
    computation = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]
    del computation[len(computation) - 1]


def _chain(module: torch.nn.Module) -> list[ParamWrapper]:
    wrappers = []
    while isinstance(module, ParamWrapper):
        wrappers.append(module)
        module = module.base_layer
    return wrappers


def _definition(module: torch.nn.Module) -> list[str]:
    """Return the names of a module's weights in the order in which its class defines them."""
    return list(getattr(module, IN_ORDER, module._parameters))


def make_portable(config: LoraConfig, model: PreTrainedModel) -> None:
    """Name layers that PEFT would rewrite by their weights, in a configuration that has been used."""
    rewritten = _rewritten_names(model)
    if not rewritten or isinstance(config.target_modules, str):
        return
    moved = {name for name in config.target_modules if name.rpartition(".")[2] in rewritten}
    if moved:
        config.target_modules = set(config.target_modules) - moved
        weights = {name + WEIGHT for name in moved}
        config.target_parameters = sorted({*(config.target_parameters or ()), *weights})


def _rewritten_names(model: PreTrainedModel) -> set[str]:
    """Return the names of layers that this version of PEFT rewrites for a model's type."""
    kinds: dict[str, str] = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    tables: dict[str, dict[str, str]] = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    kind = getattr(model.config, "model_type", "")
    return set(tables.get(kinds.get(kind, kind), {}))


def open_adapter(model: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """Return a base with a stored adapter on it, on a quantized base too.

    Args:
        model: the base.
        folder: folder that an adapter was saved to.
        name: name of the adapter in the model.

    Raises:
        ModelError: PEFT did not load all of its weights.
    """
    config = LoraConfig.from_pretrained(str(folder))
    layers = {
        path + WEIGHT
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    moved = layers & set(config.target_parameters or ())
    if moved:  # a packed weight cannot be adapted by its name, its layer can
        config.target_modules = [
            *(config.target_modules or ()),
            *(n.removesuffix(WEIGHT) for n in moved),
        ]
        config.target_parameters = sorted(set(config.target_parameters) - moved) or None
    with names_as_given():
        loaded: PeftModel = PeftModel.from_pretrained(
            model, str(folder), adapter_name=name, config=config
        )
    _require_loaded(loaded, folder, name)
    return loaded


def _require_loaded(model: PeftModel, folder: Path, name: str) -> None:
    # PEFT applies renamings of the base's files to the adapter's (Laguna: shared_expert), and continues
    # with a warning where a weight has no counterpart then
    held = get_peft_model_state_dict(model, adapter_name=name)
    stored = load_peft_weights(str(folder), device="cpu")
    lost = [
        key
        for key, weight in stored.items()
        if "lora_" in key
        and key in held
        and not torch.equal(held[key].cpu(), weight.to(held[key].dtype))
    ]
    if lost:
        raise ModelError(
            f"{folder}: PEFT did not load {len(lost)} of the adapter's {len(stored)} weights "
            f"({lost[0]}, …), because it renames them on this architecture. Adapt other modules: "
            "adapter.target_modules=attention"
        )
