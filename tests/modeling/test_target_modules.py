"""Presets, names, regular expressions and layer ranges against the modules of real architectures."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

from sweeper.config.settings import LoraAdapter
from sweeper.core.errors import ModelError
from sweeper.modeling.adapter import attach, linear_modules
from sweeper.modeling.expert_weights import computes_otherwise
from sweeper.modeling.target_modules import (
    Role,
    equal_presets,
    resolve_layers,
    resolve_targets,
    role_of,
)
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS, on_meta

LLAMA_LIKE = (
    {"q_proj", "v_proj"},
    {"q_proj", "k_proj", "v_proj", "o_proj"},
    {"gate_proj", "up_proj", "down_proj"},
)
FUSED = (
    {"query_key_value"},
    {"query_key_value", "dense"},
    {"dense_h_to_4h", "dense_4h_to_h"},
)
PRESETS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2"), LLAMA_LIKE),
    "phi": ({"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj", "dense"}, {"fc1", "fc2"}),
    "phi3": ({"qkv_proj"}, {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
    "gpt2": ({"c_attn"}, {"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
    "gpt_neox": FUSED,
    "falcon": FUSED,
    "gptj": ({"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc_in", "fc_out"}),
    "opt": ({"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
}


def _targeted(name: str, *overrides: str) -> set[str]:
    """Full names of the modules that really carry an adapter."""
    adapter = make_settings(*overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    model = attach(on_meta(CONFIGS[name]), adapter)
    prefix = "base_model.model."
    found = (key for key, module in model.named_modules() if hasattr(module, "lora_A"))
    return {key.removeprefix(prefix) for key in found}


def _endings(names: set[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_carry_adapters_where_the_architecture_has_these_modules(name: str) -> None:
    """attention and mlp split an architecture's linear modules; qv is within attention."""
    query_value, attention, mlp = (
        _targeted(name, f"adapter.target_modules={preset}")
        for preset in ("attention_qv", "attention", "mlp")
    )
    assert (_endings(query_value), _endings(attention), _endings(mlp)) == PRESETS[name]
    assert query_value <= attention
    assert not attention & mlp
    assert attention | mlp == _targeted(name, "adapter.target_modules=all-linear")
    assert attention | mlp == set(linear_modules(on_meta(CONFIGS[name])))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_a_layer_range_cuts_the_same_modules_to_these_layers(name: str, targets: str) -> None:
    """Range, list and last-N name the same layers, for all-linear too."""
    everywhere = _targeted(name, f"adapter.target_modules={targets}")
    last = {module for module in everywhere if ".1." in module}
    for layers in ("1-1", "[1]", "last-1"):
        chosen = _targeted(
            name, f"adapter.target_modules={targets}", f"adapter.layers_to_transform={layers}"
        )
        assert chosen == last, layers


def test_a_layer_range_is_what_peft_would_choose_by_names() -> None:
    """PEFT's own layers_to_transform, where it works, adapts the same modules."""
    model = on_meta(CONFIGS["llama"])
    config = LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[0])
    theirs = get_peft_model(model, config).targeted_module_names
    ours = _targeted(
        "llama", "adapter.target_modules=[q_proj,up_proj]", "adapter.layers_to_transform=0-0"
    )
    assert ours == set(theirs)


def test_layers_that_do_not_exist_are_named() -> None:
    """A range beyond the model is an error, not a smaller range."""
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(4)]
    assert resolve_layers("1-2", names) == [1, 2]
    assert resolve_layers("last-3", names) == [1, 2, 3]
    assert resolve_layers("last-4", names) == [0, 1, 2, 3]
    for wrong in ("2-4", "last-5", [7], "3-2"):
        with pytest.raises(ModelError, match="the model has layers 0 to 3"):
            resolve_layers(wrong, names)


def test_a_regular_expression_matches_full_names_of_linear_modules() -> None:
    """`regex:` is unambiguous; it never reaches the output head."""
    chosen = _targeted("llama", r'adapter.target_modules="regex:.*[.]0[.].*[.](q|v)_proj"')
    assert chosen == {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}
    everything = _targeted("llama", 'adapter.target_modules="regex:.*"')
    assert everything == set(linear_modules(on_meta(CONFIGS["llama"])))


def test_a_regular_expression_that_is_wrong_or_matches_nothing_says_so() -> None:
    """The pattern, a full name as an example, and the modules that exist."""
    names = linear_modules(on_meta(CONFIGS["gpt2"]))
    with pytest.raises(ModelError, match=r"a full name is transformer\.h\.0\.attn\.c_attn"):
        resolve_targets("regex:c_attn", names)
    with pytest.raises(ModelError, match="is not a regular expression"):
        resolve_targets("regex:(", names)


def test_a_preset_that_matches_nothing_lists_what_exists() -> None:
    """An architecture without these names answers with its own."""
    with pytest.raises(ModelError, match=r"Its linear modules are wide\. Presets: attention_qv"):
        resolve_targets("mlp", ["block.0.attn.wide"])


def test_presets_of_the_same_weights_are_found() -> None:
    """Without MLPs all-linear is attention, and where all is fused attention_qv can be as well."""
    attention = [f"layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")]
    assert equal_presets(attention) == {"all-linear": "attention"}
    assert equal_presets([*attention, "layers.0.mlp.up_proj"]) == {}
    assert equal_presets(attention[:1]) == {
        "attention": "attention_qv",
        "all-linear": "attention_qv",
    }


def test_a_number_alone_is_no_ending() -> None:
    """Gemma 3n has linear layers altup_projections.0 and blocks layers.0, which PEFT would adapt."""
    names = ["model.layers.0.mlp.up_proj", "model.altup_projections.0"]
    names += ["model.layers.0.self_attn.q_proj", "model.router"]
    found = resolve_targets("all-linear", names, None, {**_ROLES, names[1]: "other"})
    assert "0" not in found


_ROLES: dict[str, Role] = {
    "model.layers.0.mlp.up_proj": "mlp",
    "model.layers.0.self_attn.q_proj": "attention",
    "model.router": "router",
}


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model|layers|0 bartdecoderlayer|encoder_attn bartattention|q_proj linear", "tower"),
        ("model|layers|0|cross_attn mllamatextcrossattention|q_proj linear", "tower"),
        ("model|multi_modal_projector gemma3multimodalprojector|linear_1 linear", "tower"),
        (
            "model|layers|0 phi4multimodaldecoderlayer|self_attn phi4multimodalattention|o_proj",
            "attention",
        ),
    ],
)
def test_attention_to_what_a_text_lacks_is_not_adapted(path: str, role: str) -> None:
    """Cross-attention has no gradient without an encoder, and a class's name alone is no tower."""
    assert role_of(path.split("|")) == role


def test_linear_classes_that_compute_something_else_are_no_targets() -> None:
    """DeepSeek-V4's grouped product has another shape than LoRA's, and Falcon's class is plain."""
    assert computes_otherwise(DeepseekV4GroupedLinear)
    assert not computes_otherwise(FalconLinear)
