"""Loading: the traps of 4-bit on a CPU, and what a user hears of a model that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, has_avx512bf16

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import attach
from sweeper.modeling.base_model import load_base
from tests.conftest import make_settings


def _gradient_norms(*, mended: bool) -> tuple[float, float]:
    """The gradient norm of one training step before and after a forward in eval mode."""
    settings = make_settings("adapter.target_modules=attention")
    assert isinstance(settings.adapter, LoraAdapter)
    base = load_base(settings.model, settings.quantization, trained=False)
    if not mended:
        for module in base.model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = has_avx512bf16()
    torch.manual_seed(0)
    model = attach(base.model, settings.adapter)
    ids = torch.randint(0, 2000, (2, 32), generator=torch.Generator().manual_seed(0))

    def norm() -> float:
        model.zero_grad()
        model.train()
        model(ids, labels=ids).loss.backward()
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        return float(torch.stack([gradient.norm() for gradient in gradients]).norm())

    before = norm()
    model.eval()
    with torch.no_grad():
        model(ids)
    return before, norm()


def test_gradient_is_the_same_after_an_evaluation_on_nf4() -> None:
    """An evaluation in between does not change what the next training step learns."""
    before, after = _gradient_norms(mended=True)
    assert before > 0
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512_BF16, so nothing repacks")
def test_without_the_mend_an_evaluation_cuts_the_gradient() -> None:
    """The trap is real: bitsandbytes' repacking changes the gradient in silence."""
    before, after = _gradient_norms(mended=False)
    assert abs(after - before) > 0.05 * before


def test_a_base_that_is_not_there_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, an unknown id is answered with that id and the way out, not with a stack trace."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = make_settings("model.base_model=nobody/nothing")
    with pytest.raises(ModelError, match=r"'nobody/nothing' is not a local folder.*set a folder"):
        load_base(settings.model, settings.quantization, trained=False)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    """A folder that holds no model is named."""
    settings = make_settings(f"model.base_model={tmp_path}")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_base(settings.model, settings.quantization, trained=False)


def test_weights_to_be_trained_are_fp32() -> None:
    """Full fine-tuning holds fp32 master weights whatever model.dtype says."""
    settings = make_settings("adapter=none", "quantization=none", "model.dtype=bfloat16")
    base = load_base(settings.model, settings.quantization, trained=True)
    assert {weight.dtype for weight in base.model.parameters()} == {torch.float32}
