"""Whether a trial is possible, and how large it is, before a weight is loaded: PEFT is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import PretrainedConfig

from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.errors import ConfigError, ModelError
from sweeper.core.memory_limits import control_groups
from sweeper.modeling import trial_check
from sweeper.modeling.adapter import attach, lora_config
from sweeper.modeling.base_model import load_base
from sweeper.modeling.model_source import load_config, load_config_and_digest
from sweeper.modeling.trial_check import TOLERANCE, ModelChecks, nearest_rank, size_on_meta
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS, on_meta
from tests.modeling.test_adapter import LLAMA32_3B, QWEN3_06B

CPU = torch.device("cpu")


def _adapter(*overrides: str) -> LoraAdapter:
    adapter = make_settings(*overrides).adapter
    assert isinstance(adapter, LoraAdapter)
    return adapter


def _wanted(count: int | str, *overrides: str) -> LoraAdapter:
    return _adapter("adapter.r=null", f"adapter.trainable_parameters={count}", *overrides)


def _counted_by_peft(config: PretrainedConfig, adapter: LoraAdapter, r: int) -> int:
    model = on_meta(config)
    found = get_peft_model(model, lora_config(model, adapter.with_rank(r)))
    return int(found.get_nb_trainable_parameters()[0])


@pytest.mark.parametrize("wanted", [6_000, 17_777, 40_000])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", ["adapter.target_modules=attention_qv"]),
        ("llama", ["adapter.target_modules=all-linear", "adapter.layers_to_transform=last-1"]),
        ("llama", ["adapter.target_modules=mlp", "adapter.use_dora=true"]),
        ("qwen2", ["adapter.target_modules=attention", "adapter.bias=lora_only"]),
        ("gpt2", ["adapter.target_modules=attention", "adapter.modules_to_save=[ln_f]"]),
        ("llama", ["adapter.target_modules=attention", "+adapter.rank_pattern.k_proj=3"]),
    ],
)
def test_the_nearest_rank_is_the_one_that_peft_counts_nearest(
    family: str, overrides: list[str], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank next to it comes nearer: layers, DoRA's vectors, biases and patterns counted."""
    monkeypatch.setattr(trial_check, "TOLERANCE", 1e9)
    config, adapter = CONFIGS[family], _wanted(wanted, *overrides)
    rank = nearest_rank(adapter, config, "sdpa")
    near, *around = (
        abs(_counted_by_peft(config, adapter, r) - wanted)
        for r in (rank, rank + 1, *([rank - 1] if rank > 1 else []))
    )
    assert near <= min(around)


@pytest.mark.parametrize(
    ("config", "targets", "r", "trainable"),
    [
        (QWEN3_06B, "all-linear", 32, 20_185_088),
        (LLAMA32_3B, "all-linear", 16, 24_313_856),
    ],
)
def test_the_published_counts_lead_to_the_published_ranks(
    config: PretrainedConfig, targets: str, r: int, trainable: int
) -> None:
    """Two of the reports' adapters, found from their number of parameters."""
    adapter = _wanted(trainable, f"adapter.target_modules={targets}")
    assert nearest_rank(adapter, config, "sdpa") == r


@pytest.mark.parametrize(
    ("targets", "r"), [("attention_qv", 30), ("attention", 15), ("mlp", 10), ("all-linear", 6)]
)
def test_the_experiments_presets_are_of_one_size(targets: str, r: int) -> None:
    """61,440 parameters on the embedded base, to the last one, whatever is adapted; alpha follows r."""
    settings = make_settings(
        "+experiment=targets_at_equal_size", f"adapter.target_modules={targets}"
    )
    size = ModelChecks().size(settings.trial, CPU)
    assert (size.trainable, size.rank) == (61_440, r)
    adapter = settings.with_rank(size.rank).adapter
    assert isinstance(adapter, LoraAdapter)
    assert adapter.alpha == 2 * r
    base = load_base(settings.model, settings.quantization, trained=False)
    assert attach(base.model, adapter).get_nb_trainable_parameters()[0] == 61_440


def test_a_rank_is_refused_where_no_whole_one_comes_near() -> None:
    """Below half of what r=1 needs, the refusal says how many there are and how far off that is."""
    with pytest.raises(ModelError, match=r"has 2,048 \(r=1, each rank adds 2,048\), which is 105%"):
        nearest_rank(
            _wanted(1_000, "adapter.target_modules=attention_qv"), load_config(_model()), "sdpa"
        )
    nearest = 5 * 10_240
    for off, refused in ((1.001 * TOLERANCE, True), (0.999 * TOLERANCE, False)):
        adapter = _wanted(int(nearest / (1 - off)) + 1 if refused else int(nearest / (1 - off)))
        assert adapter.trainable_parameters is not None
        # from r=5 on rounding alone never misses by more than a tenth
        assert nearest_rank(adapter, load_config(_model()), "sdpa") in (5, 6)


def _model():  # type: ignore[no-untyped-def]
    return make_settings().model


@pytest.mark.parametrize(
    ("written", "number"), [("20M", 20_000_000), ("1.5M", 1_500_000), ("300k", 300_000), (7, 7)]
)
def test_a_number_of_parameters_is_written_as_people_do(written: str | int, number: int) -> None:
    """M and k, or the number itself."""
    assert _wanted(written).trainable_parameters == number


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.trainable_parameters=20M"], "give r or trainable_parameters, not both"),
        (["adapter.r=null"], r"not both or none \(r=None, trainable_parameters=None\)"),
        (["adapter.r=null", "adapter.trainable_parameters=lots"], "trainable_parameters='lots'"),
        (["adapter.r=null", "adapter.trainable_parameters=0"], "trainable_parameters=0"),
        (["adapter.r=null", "adapter.trainable_parameters=0.2k.5M"], "trainable_parameters="),
    ],
)
def test_the_rank_is_given_in_one_way(overrides: list[str], sentence: str) -> None:
    """Both, none, and what is no number are refused with words."""
    with pytest.raises(ConfigError, match=sentence):
        make_settings(*overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.target_modules=c_attn"], r"named c_attn\. Its linear modules are"),
        (["adapter.layers_to_transform=2-4"], "the model has layers 0 to 3"),
        (["quantization=nf4", "adapter.modules_to_save=[down_proj]"], r"\(nf4\).*down_proj cannot"),
        (["quantization=int8", "adapter.modules_to_save=[self_attn]"], r"\(int8\).*self_attn"),
        (["adapter.init_lora_weights=olora", "adapter.r=129"], "r=129 is more than 128"),
        (["adapter.target_modules=q_proj", "adapter.modules_to_save=[q_proj]"], "No modules"),
        (["model.attn_implementation=flash_attention_2"], "model.attn_implementation"),
    ],
)
def test_what_cannot_be_trained_is_refused_unseen(overrides: list[str], sentence: str) -> None:
    """Names, layers and combinations of options, in words, without a weight."""
    with pytest.raises(ModelError, match=sentence):
        ModelChecks().size(make_settings(*overrides).trial, CPU)


def test_what_is_refused_unseen_really_fails_or_lies() -> None:
    """Quantized weights take no gradient; OLoRA silently gives a smaller rank than was asked for."""
    settings = make_settings("quantization=nf4", "adapter.modules_to_save=[down_proj]")
    assert isinstance(settings.adapter, LoraAdapter)
    base = load_base(settings.model, settings.quantization, trained=False)
    with pytest.raises(RuntimeError, match="floating point"):
        attach(base.model, settings.adapter)
    settings = make_settings(
        *("quantization=none", "adapter.init_lora_weights=olora", "adapter.r=129"),
        "adapter.target_modules=q_proj",
    )
    assert isinstance(settings.adapter, LoraAdapter)
    model = attach(
        load_base(settings.model, settings.quantization, trained=False).model, settings.adapter
    )
    shapes = {tuple(w.shape) for name, w in model.named_parameters() if "lora_A" in name}
    assert shapes == {(128, 128)}


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantization=nf4", "adapter.modules_to_save=[norm]"],
        ["quantization=nf4", "adapter.modules_to_save=[lm_head]"],
        [
            "quantization=none",
            "adapter.modules_to_save=[down_proj]",
            "adapter.target_modules=q_proj",
        ],
        ["quantization=nf4", "adapter.init_lora_weights=olora", "adapter.r=128"],
    ],
)
def test_what_can_be_trained_is_not_refused(overrides: list[str]) -> None:
    """The neighbours of what is refused pass, and count as they do on the loaded model."""
    settings = make_settings(*overrides)
    assert isinstance(settings.adapter, LoraAdapter)
    base = load_base(settings.model, settings.quantization, trained=False)
    counted = attach(base.model, settings.adapter).get_nb_trainable_parameters()[0]
    assert ModelChecks().size(settings.trial, CPU).trainable == counted


def test_olora_on_transposed_weights_is_refused_unless_they_are_quantized() -> None:
    """As on the loaded model: bitsandbytes replaces Conv1D, transformers alone does not."""
    for kind, refused in (("none", True), ("nf4", False)):
        settings = make_settings(f"quantization={kind}", "adapter.init_lora_weights=olora").trial
        if refused:
            with pytest.raises(ModelError, match="olora does not support"):
                size_on_meta(settings, CONFIGS["gpt2"], CPU)
        else:
            assert size_on_meta(settings, CONFIGS["gpt2"], CPU).rank == 8


def test_one_structure_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is read once for a model, the adapter built once for a structure."""
    read: list[str] = []
    built: list[str] = []

    def reading(model):  # type: ignore[no-untyped-def]
        read.append(model.base_model)
        return load_config_and_digest(model)

    def building(settings: TrialSettings, *rest):  # type: ignore[no-untyped-def]
        built.append(settings.structure)
        return size_on_meta(settings, *rest)

    monkeypatch.setattr(trial_check, "load_config_and_digest", reading)
    monkeypatch.setattr(trial_check, "size_on_meta", building)
    checks = ModelChecks()
    for overrides in (
        [],
        ["training.learning_rate=1e-4", "adapter.alpha_over_r=4", "seed=3"],
        ["adapter.lora_dropout=0.1", "adapter.use_rslora=true", "training.max_steps=7"],
        ["adapter.r=4"],
        ["quantization=int8"],
        ["adapter.layers_to_transform=last-2"],
        ["training.per_device_train_batch_size=1"],
    ):
        checks.size(make_settings(*overrides).trial, CPU)
    assert len(read) == 1
    assert len(built) == len(set(built)) == 5


def test_memory_limits_stand_in_the_group_of_the_process_and_around_it(tmp_path: Path) -> None:
    """A control group of version 2 is limited by those it lies in; version 1 is not read."""
    own, root = tmp_path / "cgroup", tmp_path / "sys"
    own.write_text("0::/user.slice/job.scope\n")
    found = control_groups(own, root)
    assert found[:2] == [root / "user.slice/job.scope", root / "user.slice"]
    own.write_text("4:memory:/job\n")
    assert control_groups(own, root) == []
    assert control_groups(tmp_path / "nothing", root) == []
