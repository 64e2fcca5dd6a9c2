"""The estimate's parts against what is really held, and its whole against what can be known."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from bitsandbytes.optim import AdamW8bit
from transformers import AutoModelForCausalLM, LlamaConfig

from sweeper.config.settings import LoraAdapter
from sweeper.modeling import memory_estimate, step_memory
from sweeper.modeling.adapter import attach, count_parameters
from sweeper.modeling.base_model import load_base
from sweeper.modeling.memory_estimate import (
    LABELS,
    estimate,
    estimate_trial,
    held_bytes,
    model_on_meta,
    quantized_weights,
    state_bytes,
)
from sweeper.modeling.step_memory import (
    AliveBytes,
    PeakBytes,
    SimulatedSteps,
    StepWorkload,
    simulate_step,
)
from sweeper.modeling.trial_check import ModelChecks
from tests.conftest import make_settings
from tests.modeling.models import CONFIGS, GROUPED, HEADS, SIZE

CPU = torch.device("cpu")
DEEP = LlamaConfig(**{**GROUPED, "num_hidden_layers": 7})


def _bytes_held(model: torch.nn.Module) -> int:
    """Bytes of all weights with everything bitsandbytes keeps beside them."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            total += sum(t.numel() * t.element_size() for t in (state.absmax, state.code))
            if state.nested:
                nested = (state.offset, state.state2.absmax, state.state2.code)
                total += sum(t.numel() * t.element_size() for t in nested)
        if isinstance(weight, Int8Params):
            total += weight.SCB.numel() * weight.SCB.element_size()
    return total


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantization=none"],
        ["quantization=nf4"],
        ["quantization=fp4", "quantization.bnb_4bit_use_double_quant=false"],
        ["quantization=int8"],
        ["quantization=nf4", "model.dtype=bfloat16"],
    ],
)
def test_weights_are_what_the_loaded_base_really_holds(overrides: list[str]) -> None:
    """To the byte: packed weights, scales, code tables, and what stays in fp32."""
    settings = make_settings(*overrides)
    base = load_base(settings.model, settings.quantization, trained=False)
    found = estimate_trial(settings.trial, CPU, length=16)
    assert found.weights * 2**20 == _bytes_held(base.model)
    assert isinstance(settings.adapter, LoraAdapter)
    adapter = sum(
        w.numel() * 4 for w in attach(base.model, settings.adapter).parameters() if w.requires_grad
    )
    assert found.adapter * 2**20 == adapter


@pytest.mark.slow
def test_a_batch_without_padding_needs_the_memory_of_its_tokens() -> None:
    """As many tokens in one sequence need what they need in rows, and half of them need half of it."""
    settings = make_settings("training.per_device_train_batch_size=8", "quantization=none").trial
    rows = estimate_trial(settings, CPU, length=64, targets=16)
    whole, half = (
        estimate_trial(settings, CPU, length=64 * n, targets=16 * n, padding_free=True)
        for n in (8, 4)
    )
    assert whole.activations == pytest.approx(rows.activations, rel=0.05)
    assert whole.logits == pytest.approx(rows.logits, rel=0.05)
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.05)
    assert half.logits == pytest.approx(whole.logits / 2, rel=0.05)


def test_the_same_modules_are_quantized_as_transformers_quantizes() -> None:
    """Names on the meta device are those of the Linear4bit modules of a loaded base."""
    settings = make_settings("quantization=nf4")
    base = load_base(settings.model, settings.quantization, trained=False).model
    loaded = {
        n.removesuffix(".weight") for n, w in base.named_parameters() if isinstance(w, Params4bit)
    }
    meta = model_on_meta(base.config, settings.adapter, torch.float32, "sdpa")
    assert set(quantized_weights(meta)) == loaded


@pytest.mark.parametrize("numel", [4_095, 4_096, 100_000])
def test_8bit_optimizer_states_are_those_of_bitsandbytes(numel: int) -> None:
    """Small tensors stay in fp32; large ones take two bytes a weight and their scales."""
    weight = torch.nn.Parameter(torch.randn(numel))
    optimizer = AdamW8bit([weight])
    weight.grad = torch.randn(numel)
    optimizer.step()
    state = optimizer.state[weight]
    names = [name for name in state if name in ("state1", "state2", "absmax1", "absmax2")]
    assert state_bytes(numel, "adamw_8bit") == sum(state[n].nbytes for n in names)
    assert state_bytes(numel, "adamw_torch") == 8 * numel


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.use_dora=true"],
        ["adapter.init_lora_weights=olora"],
        ["adapter=none", "quantization=none"],
        ["adapter.layers_to_transform=last-1", "quantization=int8"],
    ],
)
def test_counts_on_meta_are_those_of_the_loaded_model(overrides: list[str]) -> None:
    """No weight is needed to know what a trial trains."""
    settings = make_settings(*overrides)
    trained = not isinstance(settings.adapter, LoraAdapter)
    model = load_base(settings.model, settings.quantization, trained=trained).model
    if isinstance(settings.adapter, LoraAdapter):
        model = attach(model, settings.adapter)
    size, count = ModelChecks().size(settings.trial, CPU), count_parameters(model)
    assert (size.trainable, size.total) == (count.trainable, count.total)


@pytest.mark.parametrize(("devices", "bytes_each"), [(1, 16), (2, 8), (4, 5), (8, 4.5)])
def test_shares_are_a_part_of_all_until_the_whole_weights_count(
    devices: int, bytes_each: float
) -> None:
    """AdamW in fp32 holds 16 bytes a parameter; the whole model, judged beside a share, 4 and 4/n."""
    settings = make_settings(
        *("adapter=none", "quantization=none", "training.optim=adamw_torch"),
        *(f"training.devices_per_trial={devices}", f"training.fsdp={devices > 1}"),
    )
    size = ModelChecks().size(settings.trial, CPU)
    assert size.held_mib == pytest.approx(bytes_each * size.total / 2**20, rel=1e-5)
    parts = estimate_trial(settings.trial, CPU, length=64)
    assert parts.weights + parts.optimizer == pytest.approx(
        12 * size.total / devices / 2**20, rel=1e-5
    )


def _rehearsed(workload: StepWorkload, attention: str = "sdpa", *overrides: str) -> PeakBytes:
    adapter = make_settings("quantization=none", *overrides).adapter
    return simulate_step(
        model_on_meta(DEEP, adapter, torch.float32, attention), workload, torch.float32
    )


def _workload(*, checkpointing: bool = False, length: int = 32, **other: int) -> StepWorkload:
    return StepWorkload(2, length, checkpointing, False, "adamw_torch", **other)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_two_depths_continue_to_the_whole_stack(
    checkpointing: bool, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The straight line through two small depths meets the full rehearsal of seven layers."""
    workload, override = _workload(checkpointing=checkpointing), f"adapter={adapter}"
    line = _rehearsed(workload, "sdpa", override)
    monkeypatch.setattr(step_memory, "DEEP", 99)
    whole = _rehearsed(workload, "sdpa", override)
    assert line.bytes == pytest.approx(whole.bytes, rel=1e-3)


def test_logits_are_three_times_fp32_over_positions_and_vocabulary() -> None:
    """Log-probabilities and two gradients of their size are alive when the loss is differentiated."""
    one = 2 * 32 * SIZE["vocab_size"] * 4
    assert 3 * one <= _rehearsed(_workload()).logits <= 3 * one + 2 * 32 * 64
    chunked = _rehearsed(_workload(loss_chunk_size=8))
    assert chunked.logits <= 3 * one / 8 + 2 * 32 * 64
    assert _rehearsed(_workload(targets=4)).logits == chunked.logits


def test_checkpointing_keeps_fewer_activations_and_eager_attention_more() -> None:
    """Both move in the direction they are used for."""
    plain = _rehearsed(_workload(length=128)).activations
    assert _rehearsed(_workload(length=128, checkpointing=True)).activations < 0.5 * plain
    maps = 7 * 2 * HEADS["num_attention_heads"] * 128 * 128 * 4
    assert _rehearsed(_workload(length=128), "eager").activations > plain + 0.5 * maps


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_estimated(name: str) -> None:
    """No formula is tied to an architecture; the table ends with the sum of its lines."""
    settings = make_settings("quantization=nf4")
    found = estimate(
        CONFIGS[name],
        settings.adapter,
        settings.quantization,
        _workload(),
        compute_dtype=torch.bfloat16,
        attn_implementation="eager" if name in ("gptj", "gemma2") else "sdpa",
        on=CPU,
    )
    parts = [getattr(found, part) for part in LABELS]
    assert all(part >= 0 for part in parts)
    assert found.activations > 0
    assert found.total == pytest.approx(sum(parts))
    assert found.table().splitlines()[-1].split()[-2] == f"{found.total:,.0f}"


def test_an_estimate_leaves_the_configuration_alone() -> None:
    """A model that is loaded with the same configuration afterwards keeps its dtype and attention."""
    settings, config = make_settings("quantization=nf4"), CONFIGS["opt"]
    before, attention = config.to_dict(), config._attn_implementation
    estimate(
        config,
        settings.adapter,
        settings.quantization,
        _workload(),
        compute_dtype=torch.bfloat16,
        attn_implementation="eager",
        on=CPU,
    )
    assert (config.to_dict(), config._attn_implementation) == (before, attention)
    assert AutoModelForCausalLM.from_config(config).dtype == torch.float32


def _counted_simulations(monkeypatch: pytest.MonkeyPatch) -> list[StepWorkload]:
    """Every step that is simulated from now on."""
    calls: list[StepWorkload] = []
    plain = SimulatedSteps._simulated

    def counted(self: SimulatedSteps, asked: StepWorkload) -> PeakBytes:
        calls.append(asked)
        return plain(self, asked)

    monkeypatch.setattr(SimulatedSteps, "_simulated", counted)
    return calls


DEEP_LLAMA = LlamaConfig(**{**GROUPED, "num_hidden_layers": 6, "vocab_size": 512})


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_batches_of_one_form_are_simulated_from_two(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One build and two simulations give every batch's bytes, if activations are kept."""
    settings = make_settings("adapter.r=4", "quantization=none")
    adapter = settings.adapter
    assert isinstance(adapter, LoraAdapter)

    def steps() -> SimulatedSteps:
        return SimulatedSteps(
            model_on_meta(DEEP_LLAMA, adapter, torch.bfloat16, "sdpa"), torch.bfloat16
        )

    def workload(size: int) -> StepWorkload:
        return StepWorkload(size, 32, recomputed, True, "adamw_torch", targets=8)

    calls = _counted_simulations(monkeypatch)
    shared = steps()
    found = [shared.peak(workload(size)) for size in (8, 4, 1, 16, 8)]
    assert len(calls) == (4 if recomputed else 2)
    own = [steps()._simulated(workload(size)) for size in (8, 4, 1, 16)]
    for one, other in zip(found, own, strict=False):
        assert one.bytes == pytest.approx(other.bytes, rel=1e-3)


def test_a_form_is_built_once_for_all_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five questions before a first step build one model, and another form builds its own."""
    built: list[object] = []
    plain = memory_estimate._build
    monkeypatch.setattr(memory_estimate, "_build", lambda *form: built.append(form) or plain(*form))
    memory_estimate._last_built.clear()
    sizes = [f"training.per_device_train_batch_size={size}" for size in (1, 2, 4, 8, 16)]
    for override in sizes:
        estimate_trial(make_settings(override).trial, CPU, length=16)
    assert len(built) == 1
    estimate_trial(make_settings("adapter.r=3").trial, CPU, length=16)
    assert len(built) == 2


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_rank_between_two_others_is_not_simulated(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its estimate is up to 1 % above the simulated one and never below. Held bytes are its own."""

    def found(rank: int, dropout: float = 0) -> memory_estimate.MemoryEstimate:
        overrides = [f"adapter.r={rank}", f"adapter.lora_dropout={dropout}", "model.dtype=bfloat16"]
        overrides.append(f"training.activation_checkpointing={str(recomputed).lower()}")
        return estimate_trial(make_settings(*overrides).trial, CPU, length=64)

    memory_estimate._simulated.clear()
    memory_estimate._last_built.clear()
    calls = _counted_simulations(monkeypatch)
    found(2), found(64)
    simulated = len(calls)
    between = {rank: found(rank) for rank in (16, 5)}
    assert len(calls) == simulated
    found(16, dropout=0.1)
    assert len(calls) > simulated
    for rank, interpolated in between.items():
        memory_estimate._simulated.clear()
        own = found(rank)
        assert own.total <= interpolated.total <= 1.01 * own.total
        assert own.adapter == interpolated.adapter
        assert own.optimizer == interpolated.optimizer


@pytest.mark.parametrize("tokens", [40, 200])
def test_unpacked_weights_that_a_cpu_keeps_are_estimated(tokens: int) -> None:
    """To the byte: the weights of fused layers that a real forward pass saves for its backward pass."""
    settings = make_settings("quantization=nf4", "adapter.r=4", "model.dtype=float32").trial
    assert isinstance(settings.adapter, LoraAdapter)
    base = load_base(settings.model, settings.quantization, trained=False).model
    model = attach(base, settings.adapter).train()
    shapes = {weight.quant_state.shape for weight in model.parameters() if _is_packed(weight)}
    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape in shapes and tensor.untyped_storage().data_ptr() not in held:
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=torch.ones(1, tokens, dtype=torch.long)).logits.sum()
    assert loss.requires_grad
    found = sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    estimate_trial(settings, CPU, length=8)
    (built,) = memory_estimate._last_built.values()
    workload = StepWorkload(1, tokens, False, False, "adamw_torch")
    assert memory_estimate._kept_unpacked(built, workload) == found
    assert (found > 0) is (tokens >= min(shape[0] for shape in shapes))


def _is_packed(weight: torch.nn.Parameter) -> bool:
    return isinstance(weight, Params4bit)


def test_only_large_states_are_paged() -> None:
    """bitsandbytes pages tensors of 100,000 elements and more: none of a small adapter's."""
    cuda = torch.device("cuda")
    adapter = make_settings("adapter.r=4").adapter
    assert isinstance(adapter, LoraAdapter)
    quantization = make_settings("quantization=none").quantization

    def states(config: LlamaConfig, optim: str) -> int:
        model = model_on_meta(config, adapter, torch.float32, "sdpa")
        return held_bytes(model, quantization, optim, cuda).optimizer

    small = LlamaConfig(**GROUPED)
    assert states(small, "paged_adamw_32bit") == states(small, "adamw_torch") > 0
    wide = LlamaConfig(**{**GROUPED, "intermediate_size": 30_000})
    assert 0 < states(wide, "paged_adamw_32bit") < states(wide, "adamw_torch")


def test_the_mask_of_a_padded_batch_is_counted() -> None:
    """A simulated step holds what a real step on rows of unequal length holds, mask included."""
    length = 256
    workload = StepWorkload(2, length, False, False, "adamw_torch", targets=8)
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED))
    simulated = simulate_step(described, workload, torch.float32).bytes
    equal = torch.ones(2, length, dtype=torch.long)
    padded = equal.clone()
    padded[1, length // 2 :] = 0
    assert simulated == pytest.approx(_real_peak(padded), rel=0.01)
    assert simulated - _real_peak(equal) >= 2 * length**2


def _real_peak(mask: torch.Tensor) -> int:
    """Bytes alive at the peak of a real step on rows with this mask."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED))
    alive = AliveBytes(known=[*model.parameters(), *model.buffers()])
    hooks = step_memory._register_hooks(model, alive)
    labels = torch.zeros(2 * 8, dtype=torch.long)
    with alive:
        step_memory._loss(model, torch.zeros_like(mask), mask, labels, 8, torch.float32).backward()
    for hook in hooks:
        hook.remove()
    return alive.peak.bytes
