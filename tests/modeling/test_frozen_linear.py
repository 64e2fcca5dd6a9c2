"""Adapted layers that compute in one function give PEFT's losses and gradients, or PEFT computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sweeper.config.settings import LoraAdapter
from sweeper.evaluation.token_loss import autocast
from sweeper.modeling import frozen_linear
from sweeper.modeling.adapter import attach, detach, load_adapter
from sweeper.modeling.base_model import load_base
from sweeper.modeling.frozen_linear import FUSED, FusedForward
from sweeper.modeling.reduced_model import disable_dropout
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS

FEW, MANY = (1, 9), (3, 40)
"""Rows and tokens of batches in which merging an adapter costs more and less than its products."""
PLAIN = {fused: plain for plain, fused in FUSED.items()}
SLOW = pytest.mark.slow
SLOW_NEOX = pytest.param("gpt_neox", marks=SLOW)


def _adapter(*overrides: str) -> LoraAdapter:
    adapter = make_settings("adapter.r=4", *overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    return adapter


def _trained(model: PreTrainedModel, *overrides: str) -> PeftModel:
    """Attach an adapter whose B matrices are not zero."""
    torch.manual_seed(0)
    adapted = attach(model, _adapter(*overrides)).train()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def _random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name])
    disable_dropout(model)
    return model


def _embedded(*overrides: str) -> PreTrainedModel:
    settings = make_settings(*overrides)
    return load_base(settings.model, settings.quantization, trained=False).model


def _as_in_peft(model: torch.nn.Module) -> None:
    """Give every layer back its class in PEFT."""
    for layer in model.modules():
        layer.__class__ = PLAIN.get(type(layer), type(layer))


def _fused(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, FusedForward)]


def _ids(shape: tuple[int, int]) -> Tensor:
    return torch.randint(3, 2000, shape, generator=torch.Generator().manual_seed(0))


def _step(model: torch.nn.Module, shape: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=_ids(shape), labels=_ids(shape)).loss
    loss.backward()
    found = ((name, p.grad) for name, p in model.named_parameters())
    return loss.detach(), {name: grad.clone() for name, grad in found if grad is not None}


def _require_equal(
    model: torch.nn.Module, shape: tuple[int, int], of_loss: float, of_gradient: float
) -> None:
    """Compare a step with the same one in PEFT's layers, by relative differences."""
    loss, gradients = _step(model, shape)
    _as_in_peft(model)
    expected, others = _step(model, shape)
    assert abs(loss - expected) <= of_loss * expected
    assert gradients.keys() == others.keys()
    for name, gradient in others.items():
        assert (gradients[name] - gradient).norm() <= of_gradient * gradient.norm(), name


@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["opt", SLOW_NEOX])
def test_a_step_is_pefts_in_float64(name: str, recomputed: bool, shape: tuple[int, int]) -> None:
    """On dense weights with biases, loss and gradients agree to 1e-10."""
    model = _trained(_random_model(name)).double()
    assert len(_fused(model)) == len([m for m in model.modules() if hasattr(m, "lora_A")])
    if recomputed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
    _require_equal(model, shape, 1e-10, 1e-10)


@pytest.mark.parametrize("targets", ["all-linear", pytest.param("attention", marks=SLOW)])
def test_a_step_on_nf4_is_pefts_to_rounding(targets: str) -> None:
    """On the embedded base in NF4 the loss agrees to 1e-6, each gradient to 2e-6."""
    model = _trained(_embedded("quantization=nf4"), f"adapter.target_modules={targets}")
    assert len(_fused(model)) == (28 if targets == "all-linear" else 16)
    _require_equal(model, (8, 60), 1e-6, 2e-6)


@pytest.mark.parametrize("shape", [pytest.param(FEW, marks=SLOW), MANY])
def test_a_judged_loss_is_pefts_to_rounding(shape: tuple[int, int]) -> None:
    """Without gradients, the logits agree to 1e-5 of the largest one, for few tokens and for many."""
    model = _trained(_embedded("quantization=nf4")).eval()
    with torch.no_grad():
        found = model(_ids(shape)).logits
        _as_in_peft(model)
        expected = model(_ids(shape)).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("base", ["quantization=nf4", "quantization=none"])
def test_outputs_may_be_changed_in_place(base: str) -> None:
    """Falcon adds its attention to its MLP's output; the gradients are those of a sum apart."""
    layer = _fused(_trained(_embedded(base)))[0]
    x = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(0))
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    in_place, apart = layer(x), layer(x)
    in_place += 1
    found = torch.autograd.grad(in_place.square().sum(), weights)
    expected = torch.autograd.grad((apart + 1).square().sum(), weights)
    assert len(found) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_gradients_add_up_over_micro_batches() -> None:
    """Two backward passes give the sum of both gradients, and frozen weights get none."""
    model = _trained(_random_model("opt")).double()
    first, second = _step(model, FEW)[1], _step(model, MANY)[1]
    model.zero_grad()
    for shape in (FEW, MANY):
        model(input_ids=_ids(shape), labels=_ids(shape)).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad} != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, first[name] + second[name])


class FunctionCalled(Exception):
    """The one function was called."""


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the one function raise, so that only PEFT's own forward can compute."""

    def refuse(*_: Any) -> Tensor:
        raise FunctionCalled

    monkeypatch.setattr(frozen_linear.LoraProduct, "apply", refuse)
    monkeypatch.setattr(frozen_linear, "_judged_product", refuse)


@pytest.mark.usefixtures("unusable")
def test_the_usual_layer_does_not_call_peft() -> None:
    """The fixture of the tests below finds a layer that computes in one function."""
    model = _trained(_random_model("qwen2"))
    with pytest.raises(FunctionCalled):
        _step(model, FEW)
    with pytest.raises(FunctionCalled), torch.no_grad():
        model(_ids(FEW))


OWN: dict[str, tuple[str, ...]] = {
    "DoRA": ("adapter.use_dora=true",),
    "trained biases": ("adapter.bias=all",),
    "dropout": ("adapter.lora_dropout=0.1",),
}


@pytest.mark.usefixtures("unusable")
@pytest.mark.parametrize("option", OWN)
def test_other_adapters_train_in_peft(option: str) -> None:
    """What is not plain LoRA without dropout is computed by PEFT."""
    _step(_trained(_random_model("opt"), *OWN[option]), FEW)


@pytest.mark.usefixtures("unusable")
def test_transposed_weights_train_in_peft() -> None:
    """GPT-2's Conv1D is no linear layer of torch."""
    assert not _fused(_trained(_random_model("gpt2")))


@SLOW
@pytest.mark.usefixtures("unusable")
@pytest.mark.parametrize(
    "base", [("quantization=int8",), ("quantization=nf4", "model.dtype=bfloat16")]
)
def test_other_bases_train_in_peft(base: tuple[str, ...]) -> None:
    """8-bit weights, and products that autocast rounds, are computed by PEFT."""
    model = _trained(_embedded(*base))
    half = "model.dtype=bfloat16" in base
    with autocast(torch.device("cpu"), torch.bfloat16 if half else torch.float32):
        _step(model, FEW)


@pytest.mark.usefixtures("unusable")
def test_a_hooked_base_layer_trains_in_peft() -> None:
    """A hook on the base's own layer would not be called by the one function."""
    base = _random_model("opt")
    for layer in base.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *_: None)
    model = _trained(base)
    assert not _fused(model)
    _step(model, FEW)


def _disabled(model: PeftModel) -> Tensor:
    with model.disable_adapter():
        logits: Tensor = model(_ids(MANY)).logits
    return logits


def _merged(model: PeftModel) -> Tensor:
    model.merge_adapter()
    logits: Tensor = model(_ids(MANY)).logits
    model.unmerge_adapter()
    return logits


def _after_merging(model: PeftModel) -> Tensor:
    model.merge_adapter()
    model.unmerge_adapter()
    logits: Tensor = model(_ids(MANY)).logits
    return logits


def _with_two(model: PeftModel) -> Tensor:
    torch.manual_seed(1)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    logits: Tensor = model(_ids(MANY)).logits
    return logits


@pytest.mark.parametrize("use", [_disabled, _merged, _after_merging, _with_two])
def test_other_states_are_pefts(use: Callable[[PeftModel], Tensor]) -> None:
    """A disabled, merged, unmerged or second adapter gives what it gives in PEFT's layers."""
    _require_same_use(use, lambda: _random_model("opt"))


@SLOW
@pytest.mark.filterwarnings("ignore:.*merge lora module to 4-bit")
@pytest.mark.parametrize("use", [_disabled, _merged, _after_merging, _with_two])
def test_other_states_on_nf4_are_pefts(use: Callable[[PeftModel], Tensor]) -> None:
    """PEFT quantizes a weight again in a merge, and the layers compute with the new one."""
    _require_same_use(use, lambda: _embedded("quantization=nf4"))


def _require_same_use(
    use: Callable[[PeftModel], Tensor], base: Callable[[], PreTrainedModel]
) -> None:
    found = []
    for fused in (True, False):
        model = _trained(base())
        if not fused:
            _as_in_peft(model)
        with torch.no_grad():
            found.append(use(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_stored_adapter_gives_the_logits_of_its_training(tmp_path: Path) -> None:
    """Saved weights are PEFT's, and an adapter that is loaded computes in the same function."""
    model = _trained(_embedded("quantization=nf4")).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(_ids(MANY)).logits
        loaded = load_adapter(detach(model), tmp_path).eval()
        assert len(_fused(loaded)) == 28
        assert torch.equal(loaded(_ids(MANY)).logits, expected)


def test_a_base_that_had_an_adapter_gives_the_next_one_the_same_step() -> None:
    """After detach no layer of the base has another class, and a second trial repeats the first."""
    base = _embedded("quantization=nf4")
    steps = []
    for _ in range(2):
        model = _trained(base)
        steps.append(_step(model, MANY))
        base = detach(model)
        assert not _fused(base)
    (loss, gradients), (other, others) = steps
    assert torch.equal(loss, other)
    assert all(torch.equal(gradients[name], others[name]) for name in others)
