"""Parts of the kit on models that are built in pieces: 8B, memory caps, padding and packed training.

A model of any size is described on the meta device and then filled with random weights, one linear layer
after the other, each quantized before the next is made. Nothing is read from or written to a disk.
"""

from __future__ import annotations

import gc
import inspect
import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GIB = 2**30
CAPS_GIB = (8, 12, 16, 24)
CONTEXT_GIB = 0.5
LORA_RANK = 16
LEAST_PAGED = 100_000
"""Elements from which on bitsandbytes pages the states of a tensor."""


def device() -> torch.device:
    """Return the GPU, or the CPU in the rehearsal."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """Return bf16 on a GPU and fp32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def qwen3(shape: tuple[Any, ...]) -> Qwen3Config:
    """Return the configuration of one of the kit's shapes."""
    hidden, layers, heads, kv, head_dim, inner, vocabulary, tied = shape
    return Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        eos_token_id=0,
        bos_token_id=None,
    )


class PackedLora(nn.Module):
    """A frozen layer with the adapters of K trials, whose rows follow each other in the batch."""

    def __init__(self, base: nn.Module, trials: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(trials, inputs, LORA_RANK, device=device()) * 0.02)
        self.up = nn.Parameter(torch.randn(trials, LORA_RANK, outputs, device=device()) * 0.02)

    def forward(self, states: Tensor) -> Tensor:
        """Add each trial's own product to the base's."""
        by_trial = states.reshape(self.down.shape[0], -1, states.shape[-1])
        added = torch.bmm(torch.bmm(by_trial, self.down), self.up)
        result: Tensor = self.base(states)
        return result + added.reshape(result.shape)


def in_pieces(config: Qwen3Config) -> nn.Module:
    """Return an NF4 model with random weights, of which only one layer at a time was unquantized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, _quantized_layer(module))
    for owner in model.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            if weight.is_meta:
                filled = torch.empty(weight.shape, dtype=weight.dtype, device=device())
                nn.init.normal_(filled, std=0.02) if weight.dim() > 1 else nn.init.ones_(filled)
                setattr(owner, name, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    inner = model.model
    with device():
        inner.rotary_emb = type(inner.rotary_emb)(config)
    return model.requires_grad_(False).train()


def _quantized_layer(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, False, compute_dtype(), quant_type="nf4"
    )
    weight = torch.randn(layer.out_features, layer.in_features, dtype=compute_dtype()) * 0.02
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return made.to(device())


def with_adapters(model: nn.Module, trials: int) -> list[nn.Parameter]:
    """Give every quantized layer the adapters of some trials, and return their weights."""
    for name, module in list(model.named_modules()):
        packed = isinstance(module, PackedLora)
        plain = isinstance(module, bnb.nn.Linear4bit) and not name.endswith(".base")
        if packed or plain:
            base = module.base if packed else module
            sizes = (base.in_features, base.out_features)
            model.set_submodule(name, PackedLora(base, trials, *sizes))
    return [weight for weight in model.parameters() if weight.requires_grad]


def train_step(model: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step on the loss of every second position."""
    with torch.autocast(device().type, compute_dtype(), enabled=torch.cuda.is_available()):
        logits = model(input_ids=ids, use_cache=False).logits[:, ::2].flatten(0, 1)
    nn.functional.cross_entropy(logits.float(), ids[:, ::2].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds_of(step: Callable[[], None], rounds: int) -> float:
    """Return the median seconds of a step after a warm-up."""
    found = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.monotonic() - began)
    return median(found[1:])


def eight_b(shapes: dict[str, Any], cpu: bool) -> Iterator[tuple[str, object]]:
    """Yield memory and speed of an 8B shape in NF4 with LoRA on every layer."""
    began = time.monotonic()
    model = in_pieces(qwen3(shapes["q8"]))
    yield "built", {"seconds": round(time.monotonic() - began, 1), **held()}
    weights = with_adapters(model, 1)
    paged = sum(weight.numel() >= LEAST_PAGED for weight in weights)
    yield "tensors", {"all": len(weights), "paged_by_bitsandbytes": paged}
    optimizer = torch.optim.AdamW(weights, 1e-4)
    for rows, length in ((1, 32), (2, 32)) if cpu else ((1, 1024), (4, 1024), (16, 256)):
        ids = torch.randint(3, shapes["q8"][6], (rows, length), device=device())
        reset_peak()
        try:
            took = seconds_of(lambda ids=ids: train_step(model, ids, optimizer), 1 if cpu else 3)
            yield f"{rows}x{length}", {"tokens_per_second": round(rows * length / took), **held()}
        except torch.OutOfMemoryError as error:
            yield f"{rows}x{length}", {"cause": "oom", "message": str(error)[:200]}


def caps(shapes: dict[str, Any], cpu: bool) -> Iterator[tuple[str, object]]:
    """Yield a table of the micro-batches that fit into 8, 12, 16 and 24 GiB, each tried with one step."""
    table = [
        "| NF4, LoRA on every layer, peak in GiB | "
        + " | ".join(f"{cap} GiB" for cap in CAPS_GIB)
        + " |"
    ]
    table.append("|---" + "|--:" * len(CAPS_GIB) + "|")
    for name, shape in shapes.items():
        model = in_pieces(qwen3(shape))
        weights = with_adapters(model, 1)
        for rows in (1, 2) if cpu else (1, 4, 16):
            ids = torch.randint(3, shape[6], (rows, 32 if cpu else 1024), device=device())
            fits = {f"{cap} GiB": _fits(model, weights, ids, cap) for cap in CAPS_GIB}
            label = f"{name} {rows} rows of {ids.shape[1]}"
            yield label, fits
            table.append(f"| {label} | " + " | ".join(fits.values()) + " |")
        del model, weights
        release()
    yield "table", table


def _fits(model: nn.Module, weights: list[nn.Parameter], ids: Tensor, cap_gib: float) -> str:
    """Return the step's peak in GiB under a cap of the allocator, or 'oom', or 'uncapped' on a CPU."""
    release()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = (cap_gib - CONTEXT_GIB) * GIB / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed))
    reset_peak()
    try:
        train_step(model, ids, torch.optim.AdamW(weights, 1e-4))
        return f"{held()['peak_mib'] / 1024:.1f}" if torch.cuda.is_available() else "uncapped"
    except torch.OutOfMemoryError:
        for weight in weights:
            weight.grad = None
        return "oom"
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


def padding(folder: str, cpu: bool) -> Iterator[tuple[str, object]]:
    """Yield tokens per second of padded batches, of batches without padding, and of varlen kernels."""
    from sweeper.data.padding_free import PaddingFreeCollator
    from sweeper.data.tokens import PaddingCollator

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 48 if cpu else 1024, (4 if cpu else 16,), generator=generator)
    rows = [{"input_ids": [5] * int(n), "labels": [5] * int(n)} for n in lengths]
    forms: dict[str, Any] = {
        "padded": PaddingCollator(0),
        "without_padding": PaddingFreeCollator(),
        "torch_varlen": PaddingFreeCollator(),
        "flash_attention_2": PaddingFreeCollator(),
    }
    for name, collate in forms.items():
        if cpu and name in ("torch_varlen", "flash_attention_2"):
            yield name, "needs a GPU"
            continue
        try:
            batch = {key: value.to(device()) for key, value in collate(rows).items()}
            yield name, _tokens_per_second(folder, name, batch, int(lengths.sum()), cpu)
        except (ImportError, ValueError, RuntimeError) as error:
            yield name, {"cause": type(error).__name__, "message": str(error)[:200]}
        release()


def _tokens_per_second(
    folder: str, form: str, batch: dict[str, Tensor], tokens: int, cpu: bool
) -> dict[str, float]:
    from sweeper.evaluation.token_loss import target_nll

    model = load_for(folder, form)
    if form == "flash_attention_2":  # transformers finds the rows by their positions
        batch.pop("attention_mask")

    def step() -> None:
        target_nll(model, batch).backward()
        model.zero_grad()

    reset_peak()
    took = seconds_of(step, 1 if cpu else 5)
    return {"tokens_per_second": round(tokens / took), **held()}


def load_for(folder: str, form: str) -> Any:
    """Return a model whose attention takes batches of a form."""
    from sweeper.modeling.padding_proof import confine_to_rows

    attention = form if form == "flash_attention_2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=compute_dtype(), attn_implementation=attention
    ).to(device())
    if form == "without_padding":
        confine_to_rows(model)
    if form == "torch_varlen":
        AttentionInterface.register(form, attend_by_varlen)
        AttentionMaskInterface.register(form, sdpa_mask)
        model.set_attn_implementation(form)
    return model


def attend_by_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend within the rows of a batch without padding by torch's own kernel for rows of any length."""
    from torch.nn.attention import varlen

    from sweeper.data.padding_free import ROW_BOUNDS

    bounds, heads = options[ROW_BOUNDS], query.shape[1] // key.shape[1]
    # older releases have no grouped heads, and their parameter for a causal mask is another one
    keys, values = (each.repeat_interleave(heads, dim=1) for each in (key, value))
    known = inspect.signature(varlen.varlen_attn).parameters
    causal: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    )
    flat = (each[0].transpose(0, 1).contiguous() for each in (query, keys, values))
    # a bound on the rows' lengths that needs no synchronisation with the GPU
    longest = query.shape[2]
    found = varlen.varlen_attn(*flat, bounds, bounds, longest, longest, **causal)
    assert isinstance(found, Tensor)
    return found[None], None


def packed(shapes: dict[str, Any], cpu: bool) -> Iterator[tuple[str, object]]:
    """Yield the seconds of K trials in one batch and of the same K trials one after the other."""
    for name in ("q06", "q8"):
        model = in_pieces(qwen3(shapes[name]))
        for tokens in (32, 64) if cpu else (256, 1024):
            one = _step_seconds(model, 1, tokens, shapes[name][6], cpu)
            for trials in (1, 2) if cpu else (1, 4, 16):
                try:
                    together = _step_seconds(model, trials, tokens, shapes[name][6], cpu)
                except torch.OutOfMemoryError as error:
                    result: dict[str, object] = {"cause": "oom", "message": str(error)[:200]}
                else:
                    result = {
                        "together_s": round(together, 4),
                        "one_after_the_other_s": round(trials * one, 4),
                        "gain": round(trials * one / together, 2),
                        **held(),
                    }
                yield f"{name} {tokens} tokens K={trials}", result
                release()
        del model
        release()


def _step_seconds(model: nn.Module, trials: int, tokens: int, vocabulary: int, cpu: bool) -> float:
    reset_peak()
    optimizer = torch.optim.AdamW(with_adapters(model, trials), 1e-4)
    ids = torch.randint(3, vocabulary, (trials, tokens), device=device())
    return seconds_of(lambda: train_step(model, ids, optimizer), 1 if cpu else 5)


def held() -> dict[str, float]:
    """Return the MiB that are allocated now and were at the peak, or nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return {"allocated_mib": round(now / 2**20), "peak_mib": round(peak / 2**20)}


def reset_peak() -> None:
    """Begin to measure a new peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def release() -> None:
    """Return what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tiny = {name: (64, 2, 4, 2, 16, 128, 4096, name != "q8") for name in ("q06", "q8")}
    for part in (eight_b, caps, packed):
        for key, value in part(tiny, True):
            print(part.__name__, key, value)
