"""The five reports are experiments, and no fact of them is without a carrier."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from sweeper.config.compose import compose, with_auto_groups
from sweeper.config.settings import RunSettings, flatten, validate
from sweeper.search.study_plan import single, studies

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "reports.md"
FACTS = {0: 30, 1: 41, 2: 51, 3: 36, 4: 24}
"""How many facts each report states."""

STATED = {
    "qwen3_alpaca": {
        "model.base_model": "Qwen/Qwen3-0.6B-Base",
        "model.dtype": "float16",
        "data.max_samples": 100,
        "quantization.load_in_4bit": False,
        "adapter.r": 32,
        "adapter.lora_dropout": 0.2,
        "training.learning_rate": 2e-5,
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 4,
        "training.optim": "paged_adamw_8bit",
    },
    "qwen2_5_instruct": {
        "model.base_model": "Qwen/Qwen2.5-1.5B-Instruct",
        "data.train": "/kaggle/input/instruct-dataset/train.jsonl",
        "data.validation": "/kaggle/input/instruct-dataset/val.jsonl",
        "data.max_length": 512,
        "data.train_on": "everything",
        "quantization.load_in_4bit": True,
        "quantization.bnb_4bit_quant_type": "nf4",
        "quantization.bnb_4bit_compute_dtype": "float16",
        "adapter.r": 16,
        "adapter.lora_dropout": 0.05,
        "adapter.target_modules": ["q_proj", "v_proj"],
        "training.learning_rate": 2e-4,
        "training.num_train_epochs": 3,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 2,
        "training.optim": "adamw_torch",
        "training.logging_steps": 10,
        "evaluation.per_device_eval_batch_size": 2,
    },
    "llama3_2_finetome": {
        "model.base_model": "unsloth/Llama-3.2-3B-Instruct",
        "data.train": "mlabonne/FineTome-100k",
        "data.validation_ratio": 0.15,
        "quantization.load_in_4bit": True,
        "training.learning_rate": 2e-4,
        "training.warmup_steps": 5,
        "training.weight_decay": 0.01,
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.optim": "adamw_8bit",
        "evaluation.generation.num_examples": 100,
        "evaluation.generation.max_new_tokens": 256,
    },
    "llama3_ranks": {
        "model.base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "model.dtype": "bfloat16",
        "model.attn_implementation": "eager",
        "data.max_length": 1024,
        "data.max_samples": 40_000,
        "data.validation_ratio": 0.1,
        "adapter.r": 8,
        "adapter.lora_alpha": 16,
        "adapter.lora_dropout": 0.0,
        "adapter.target_modules": "attention",
        "adapter.bias": "none",
        "training.learning_rate": 1e-4,
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 100,
        "training.max_steps": 700,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 8,
        "training.optim": "adamw_8bit",
        "training.eval_steps": 100,
    },
    "gpt2_book": {
        "model.base_model": "gpt2",
        "data.format": "text",
        "quantization.load_in_4bit": False,
        "adapter.r": 8,
        "adapter.lora_dropout": 0.05,
        "adapter.target_modules": ["c_attn"],
        "training.learning_rate": 3e-4,
        "training.lr_scheduler_type": "cosine",
        "training.num_train_epochs": 3,
        "training.per_device_train_batch_size": 16,
        "training.optim": "adamw_torch",
    },
}
ALPHAS = {"qwen3_alpaca": 64, "qwen2_5_instruct": 32, "llama3_ranks": 16, "gpt2_book": 16}
SEARCHES = ("finetome_search", "finetome_mixture")


def _settings(experiment: str, *overrides: str) -> RunSettings:
    return validate(
        RunSettings, compose(with_auto_groups([f"+experiment={experiment}", *overrides])).config
    )


@pytest.mark.parametrize("experiment", sorted(STATED))
def test_experiment_states_the_reports_values(experiment: str) -> None:
    """Model, data and hyperparameters are the report's, to the last one it names."""
    settings = _settings(experiment)
    flat = flatten(settings.model_dump())
    wanted = STATED[experiment]
    assert {key: flat[key] for key in wanted} == wanted
    if experiment in ALPHAS:
        assert settings.adapter.method == "lora"
        assert settings.adapter.alpha == ALPHAS[experiment]


@pytest.mark.parametrize("experiment", [*sorted(STATED), *SEARCHES])
def test_stand_in_changes_model_data_and_length_only(experiment: str) -> None:
    """With +stand_in=tiny the adapter, the optimiser and the template stay the report's."""
    real, tiny = _settings(experiment), _settings(experiment, "+stand_in=tiny")
    assert tiny.model.base_model.startswith("stand_in:")
    assert tiny.adapter == real.adapter
    for kept in ("optim", "learning_rate", "lr_scheduler_type", "weight_decay"):
        assert getattr(tiny.training, kept) == getattr(real.training, kept)
    assert (tiny.data.format, tiny.data.template) == (real.data.format, real.data.template)


@pytest.mark.parametrize("experiment", ["llama3_ranks", "gpt2_book", "finetome_search"])
def test_studies_of_the_reports_can_be_planned(experiment: str) -> None:
    """The search spaces are valid, here with the stand-in's paths."""
    (plan,) = studies([f"+experiment={experiment}", "+stand_in=tiny"])
    assert plan.study.study_name == experiment


@pytest.mark.parametrize("experiment", sorted(STATED))
def test_single_runs_of_the_reports_can_be_planned(experiment: str) -> None:
    """Without -m an experiment is the report's own run."""
    assert single([f"+experiment={experiment}", "+stand_in=tiny"]).seed >= 0


def test_every_fact_has_a_carrier() -> None:
    """docs/reports.md lists each fact of each report once."""
    rows = re.findall(r"^\| ((?:\d\.\d+(?:, )?)+) \|", REPORTS.read_text(encoding="utf-8"), re.M)
    listed = Counter(fact for row in rows for fact in row.split(", "))
    wanted = {f"{report}.{n}" for report, count in FACTS.items() for n in range(1, count + 1)}
    assert set(listed) == wanted
    assert max(listed.values()) == 1


def test_carriers_exist() -> None:
    """Every file that docs/reports.md names is there, and every key is a setting."""
    text = REPORTS.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:conf|sweeper|tests|experiments)/[\w./]+)`", text)
    assert {path.partition("/")[0] for path in paths} == {"conf", "sweeper", "tests", "experiments"}
    for path in paths:
        assert (ROOT / path).exists(), path
    known = flatten(_settings("qwen2_5_instruct").model_dump())
    sections = ("model", "data", "adapter", "quantization", "training", "evaluation")
    keys = re.findall(rf"`((?:{'|'.join(sections)})\.[\w.]+)", text)
    assert {key.partition(".")[0] for key in keys} == set(sections)
    for key in keys:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key
