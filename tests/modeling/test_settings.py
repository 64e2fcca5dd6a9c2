"""What a model, its quantization and its adapter may be, found out before anything is loaded."""

from __future__ import annotations

import pytest

from sweeper.config.settings import LoraAdapter, QuantizationSettings, validate
from sweeper.core.errors import ConfigError
from tests.conftest import make_settings


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
def test_every_quantization_has_the_name_of_its_group_choice(kind: str) -> None:
    """quantization=X composes into settings whose kind is X."""
    assert make_settings(f"quantization={kind}").quantization.kind == kind


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["quantization.load_in_8bit=true"], "load_in_4bit and load_in_8bit are both true"),
        (["adapter=none"], r"quantized base \(nf4\) does not allow. Add quantization=none"),
        (
            ["adapter=none", "quantization=int8"],
            r"quantized base \(int8\) does not allow",
        ),
        (["quantization=int8", "adapter.use_dora=true"], "Choose quantization=none, nf4 or fp4"),
        (["adapter.init_lora_weights=pissa_niter_4"], "fails on a 4-bit.*Choose default, gaussian"),
        (["adapter.init_lora_weights=eva"], "needs a pass over the data.*Choose default, gaussian"),
        (["adapter.init_lora_weights=loftq"], "needs CUDA.*Choose default, gaussian, olora"),
        (["adapter.init_lora_weights=true"], "its name here is default"),
        (["adapter.init_lora_weights=xavier"], "is no initialisation. Choose default, gaussian"),
        (
            ["adapter.layers_to_transform=last:8"],
            "range such as 0-11 .both ends included., or last-8",
        ),
        (["adapter.layers_to_transform=[]"], "names no layers"),
        (["adapter.loraplus_lr_ratio=0.5"], "adapter.loraplus_lr_ratio=0.5: "),
        (["adapter.lora_alpha=16"], "give lora_alpha or alpha_over_r, not both"),
    ],
)
def test_a_setting_that_cannot_work_names_the_valid_choices(
    overrides: list[str], sentence: str
) -> None:
    """Refused while settings are read, with the way out in the sentence."""
    with pytest.raises(ConfigError, match=sentence):
        make_settings(*overrides)


def test_alpha_over_r_also_holds_where_rank_pattern_sets_another_r() -> None:
    """A module with twice the rank gets twice the alpha, unless alpha_pattern says otherwise."""
    adapter = make_settings(
        *("adapter.r=8", "adapter.alpha_over_r=2"),
        *("+adapter.rank_pattern.q_proj=16", "+adapter.rank_pattern.v_proj=4"),
    ).adapter
    assert isinstance(adapter, LoraAdapter)
    assert adapter.alphas == {"q_proj": 32, "v_proj": 8}
    told = adapter.model_copy(update={"alpha_pattern": {"v_proj": 1.0}})
    assert told.alphas == {"q_proj": 32, "v_proj": 1}
    fixed = adapter.model_copy(update={"alpha_over_r": None, "lora_alpha": 16.0})
    assert fixed.alphas == {}


def test_a_missing_width_is_an_error() -> None:
    """Defaults live in conf/ only."""
    with pytest.raises(ConfigError, match="load_in_8bit: missing"):
        validate(QuantizationSettings, {"load_in_4bit": True})
