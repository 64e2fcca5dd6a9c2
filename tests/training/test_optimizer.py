"""Every optimiser and schedule trains, and follows its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    set_seed,
)

from sweeper.data.tokens import Encoded
from sweeper.folders import TrialFolder
from sweeper.training.meter import Meter
from sweeper.training.optimizer import loraplus_optimizer
from sweeper.training.trial import TrialInputs, train_trial
from tests.conftest import make_settings
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

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
            return 0.01 * step / 2
        return float(0.01 * decay((step - 2) / 6))

    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    logged = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert logged == pytest.approx([rate(step) for step in range(8)], abs=1e-9)


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


def test_loraplus_ratio_reaches_the_training_loop(tiny_base: Path, tmp_path: Path) -> None:
    """The ratio in a trial's inputs changes what is learned; without it nothing changes."""
    ids = list(range(2, 12))
    rows = Encoded([{"input_ids": ids, "labels": ids}] * 8, 0)
    settings = make_settings(
        *("quantization=none", "training.max_steps=3", "training.eval_steps=3"),
        "training.activation_checkpointing=false",
    ).trial
    found = {}
    for name, ratio in (("plain", None), ("again", None), ("plus", 16.0)):
        set_seed(0)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(tiny_base),
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        inputs = TrialInputs(model, tokenizer, rows, rows, loraplus_lr_ratio=ratio)
        folder = TrialFolder(tmp_path / name)
        found[name] = train_trial(inputs, settings, folder, Recorder(), Meter()).best_value
    assert found["plain"] == found["again"]
    assert found["plus"] is not None
    assert found["plain"] is not None
    assert found["plus"] < found["plain"]
