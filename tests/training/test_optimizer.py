"""Every optimiser and schedule trains, and follows its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from sweeper.training.optimizer import loraplus_optimizer, optimizer_class
from sweeper.training.trial_runner import TransformersRunner
from tests.training.conftest import RunTiny

OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"),
    "paged_adamw_32bit",
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_lowers_the_loss(name: str, run_tiny: RunTiny) -> None:
    """Each of them learns, on this machine as on a GPU."""
    outcome, losses, _ = run_tiny(
        *("t", "adapter=none", f"training.optim={name}"),
        *("training.learning_rate=0.01", "training.weight_decay=0.01"),
    )
    assert outcome.cause == "finished", outcome.message
    assert losses[-1][1] < losses[0][1]


def _cosine(progress: float, cycles: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1.0)))


@pytest.mark.parametrize("name", ["cosine", "cosine_with_restarts", "linear", "constant", "warmup"])
def test_schedule_gives_the_rates_of_its_definition(name: str, run_tiny: RunTiny) -> None:
    """Eight logged rates against the formula, two steps of warm-up where there is one."""
    kind = "constant_with_warmup" if name == "warmup" else name
    outcome, _, folder = run_tiny(
        "t",
        *(f"training.lr_scheduler_type={kind}", "training.learning_rate=0.01"),
        *("training.max_steps=8", "training.warmup_steps=2", "training.eval_steps=8"),
        "training.lr_scheduler_kwargs.num_cycles=2",
    )
    assert outcome.cause == "finished", outcome.message
    decay = {
        "cosine": lambda p: _cosine(p, 1),
        "cosine_with_restarts": lambda p: _cosine(p, 2),
        "linear": lambda p: 1 - p,
        "constant": lambda _: 1.0,
        "warmup": lambda _: 1.0,
    }[name]

    def rate(step: int) -> float:  # the rate that step number `step`, from 0, is taken with
        if name != "constant" and step < 2:
            return 0.01 * (step + 1) / 3  # a run of few steps loses none of them to a rate of 0
        return float(0.01 * decay((step - 2) / 6))

    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    logged = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert logged == pytest.approx([rate(step) for step in range(8)], abs=1e-9)


def test_adamw_on_a_cpu_is_fused_and_the_same(tmp_path: Path) -> None:
    """Five steps of the fused form are torch's plain ones to 2e-6 of their length."""
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, optim="adamw_torch", weight_decay=0.1, use_cpu=True
    )
    kind, options = optimizer_class(arguments, None)
    assert (kind, options["fused"]) == (torch.optim.AdamW, True)
    torch.manual_seed(0)
    start, gradients = torch.randn(30, 40), torch.randn(5, 30, 40)
    ends = []
    for form in (options, {**options, "fused": False}):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], **form)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
    fused, plain = ends
    assert (fused - plain).norm() <= 2e-6 * plain.norm() > 0


@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_8bit"])
def test_loraplus_gives_b_its_own_rate(name: str, tmp_path: Path) -> None:
    """Ratio 16: every B matrix learns at 16 times the rate of every A; all are in one group."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=64))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, optim=name, weight_decay=0.1, report_to="none"
    )
    optimizer = loraplus_optimizer(model, arguments, 16.0)
    rates = {
        id(weight): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    named = {n: w for n, w in model.named_parameters() if w.requires_grad}
    assert set(rates) == {id(weight) for weight in named.values()}
    for weight_name, weight in named.items():
        expected = 0.016 if "lora_B" in weight_name else 0.001
        assert rates[id(weight)] == (pytest.approx(expected), 0.1)
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    before = {n: w.detach().clone() for n, w in named.items()}
    optimizer.step()
    assert any(not torch.equal(before[n], w) for n, w in named.items() if "lora_B" in n)


def test_loraplus_ratio_reaches_the_training_loop(run_tiny: RunTiny) -> None:
    """adapter.loraplus_lr_ratio changes what is learned, for the better; 1 is plain AdamW."""
    runner = TransformersRunner(threads=1)
    plain, same, plus = (
        run_tiny(name, f"adapter.loraplus_lr_ratio={ratio}", runner=runner)[1][-1][1]
        for name, ratio in (("plain", "null"), ("same", "1.0"), ("plus", "16.0"))
    )
    assert same == pytest.approx(plain, abs=1e-6)
    assert plus < plain
