"""Full fine-tuning with the weights spread over devices (FSDP2): the same trial as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeGenConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from sweeper.builtin.embedded import BASE_DIR
from sweeper.core.errors import ConfigError, WorkerError
from sweeper.core.paths import TrialFolder
from sweeper.training import trial_runner as runner_module
from sweeper.training.sharded_trainer import ShardedTrainer, load_sharded
from tests.conftest import make_settings
from tests.training.recorder import Recorder
from tests.workers.together import KillsFollowers, Train, spooled

FULL = ("adapter=none", "training.optim=adamw_torch")
EAGER = "model.attn_implementation=eager"
SHARDED = (*FULL, "training.devices_per_trial=2", "training.fsdp=true")
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
GPT = {"vocab_size": 2048, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
CONFIGS: dict[str, PretrainedConfig] = {
    # head and embedding are one weight; blocks that transformers has no sharding plan for
    "gpt2": GPT2Config(**GPT, **NO_DROPOUT),
    "qwen3": Qwen3Config(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
        **{"vocab_size": 2048, "max_position_embeddings": 512, "tie_word_embeddings": True},
    ),
    # a head that is only reached by the model's own forward
    "codegen": CodeGenConfig(**GPT, **NO_DROPOUT, rotary_dim=4),
}


def stored(folder: TrialFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.model / "model.safetensors")


def assert_same_trial(train: Train, *overrides: str) -> None:
    alone, one, first = train("one", *FULL, *overrides)
    together, two, second = train("two", *SHARDED, *overrides)
    assert together.cause == alone.cause == "finished", together.message
    assert together.best_value == pytest.approx(alone.best_value, abs=1e-5)
    losses = [value for _, value in one.losses]
    assert [value for _, value in two.losses] == pytest.approx(losses, abs=1e-5)
    for name in ("parameters/trainable", "parameters/total", "data/train_rows"):
        assert together.metrics[name] == alone.metrics[name]
    for name in ("train/loss", "train/grad_norm"):
        assert spooled(second, name) == pytest.approx(spooled(first, name), abs=1e-4)
    weights, expected = stored(second), stored(first)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)


def test_sharded_weights_train_the_trial_of_one_device(train: Train) -> None:
    """Losses of training and evaluation, gradient norms and stored weights are those of one device."""
    assert_same_trial(train)


def make_base(name: str, folder: Path) -> str:
    """Overrides for a randomly initialised model of an architecture."""
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)
    return f"model.base_model={folder}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_are_sharded(train: Train, tmp_path: Path, name: str) -> None:
    """Tied weights, blocks without a plan of transformers', heads inside a forward: the same trial."""
    assert_same_trial(train, make_base(name, tmp_path / name), EAGER)


@pytest.mark.slow
def test_what_saves_memory_works_on_shares(train: Train) -> None:
    """Recomputed activations, a loss in chunks and accumulated micro-batches change nothing."""
    assert_same_trial(
        train,
        *("training.activation_checkpointing=true", "training.loss_chunk_size=16"),
        *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"),
    )


@pytest.mark.slow
def test_generated_answers_are_judged_on_shares(train: Train, tmp_path: Path) -> None:
    """A trial may be steered by what the sharded model writes, learned positions included."""
    assert_same_trial(
        train,
        *(make_base("gpt2", tmp_path / "gpt2"), EAGER),
        *("objective.metric=eval/rougeL", "objective.direction=maximize"),
        *("evaluation.generation.max_new_tokens=8", "evaluation.generation.num_examples=4"),
    )


@pytest.mark.slow
def test_bfloat16_shares_learn_as_one_device_does(train: Train) -> None:
    """Weights travel and compute in bfloat16; the losses are those of autocast within its rounding."""
    alone, one, _ = train("one", *FULL, "model.dtype=bfloat16")
    together, two, second = train("two", *SHARDED, "model.dtype=bfloat16")
    assert together.best_value == pytest.approx(alone.best_value, rel=5e-3)
    losses = [value for _, value in one.losses]
    assert [value for _, value in two.losses] == pytest.approx(losses, rel=5e-3)
    assert {weight.dtype for weight in stored(second).values()} == {torch.float32}


@pytest.mark.slow
def test_accumulated_gradients_are_spread_at_once(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two micro-batches no device keeps a whole gradient."""
    seen: list[float] = []
    step = ShardedTrainer.compute_loss

    def watching(trainer: ShardedTrainer, model: torch.nn.Module, *rest: Any, **items: Any) -> Any:
        seen.extend(
            weight.grad.to_local().numel() / weight.numel()
            for weight in model.parameters()
            if weight.grad is not None
        )
        return step(trainer, model, *rest, **items)

    monkeypatch.setattr(ShardedTrainer, "compute_loss", watching)
    two = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4")
    outcome, _, _ = train("accumulated", *SHARDED, *two)
    assert outcome.cause == "finished"
    assert len(seen) > 10
    assert set(seen) == {0.5}


@pytest.mark.slow
def test_each_device_holds_its_share(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every weight, and so of its gradient and its optimizer states, the leader has one half."""
    held: list[float] = []

    def watching(whole: PreTrainedModel, *rest: Any) -> PreTrainedModel:
        model = load_sharded(whole, *rest)
        assert all(parameter.is_meta for parameter in whole.parameters())
        held.extend(p.to_local().numel() / p.numel() for p in model.parameters())
        return model

    monkeypatch.setattr(runner_module, "load_sharded", watching)
    outcome, _, _ = train("shares", *SHARDED)
    assert outcome.cause == "finished"
    assert len(held) > 10
    assert set(held) == {0.5}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_killed_sharded_trial_goes_on_from_its_checkpoint(
    train: Train, tmp_path: Path, tiny_base: Path, name: str
) -> None:
    """Weights (tied ones, too), optimizer states and schedule are those of a trial never killed."""
    base = make_base(name, tmp_path / name) if name in CONFIGS else f"model.base_model={tiny_base}"
    _, whole, expected = train("whole", *SHARDED, base, EAGER)
    with pytest.raises(WorkerError, match="rank 1 died"):
        train("killed", *SHARDED, base, EAGER, observer=KillsFollowers())
    outcome, recorder, folder = train("killed", *SHARDED, base, EAGER)
    assert outcome.cause == "finished"
    assert [step for step, _ in recorder.losses] == [4, 6]
    losses = [value for _, value in whole.losses[1:]]
    assert [value for _, value in recorder.losses] == pytest.approx(losses, abs=1e-6)
    for key, weight in stored(expected).items():
        torch.testing.assert_close(stored(folder)[key], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_pruned_sharded_trial_ends_everywhere(train: Train) -> None:
    """It stops at the same step everywhere, keeps its best weights whole, and the next one trains."""
    outcome, _, folder = train("first", *SHARDED, observer=Recorder(stop_after=1))
    assert (outcome.cause, outcome.steps) == ("pruned", 2)
    assert stored(folder)
    outcome, _, _ = train("second", *SHARDED)
    assert outcome.cause == "finished"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("adapter=none", "quantization=none", "training.fsdp=true"), "set devices_per_trial to 2"),
        (
            (*SHARDED, "quantization=none", "training.optim=adamw_8bit"),
            r"adamw_8bit cannot be spread",
        ),
        (
            ("training.devices_per_trial=2", "training.fsdp=true"),
            "is for full fine-tuning",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(overrides: tuple[str, ...], words: str) -> None:
    """One device, an adapter, bitsandbytes' optimizers: refused before anything is trained."""
    with pytest.raises(ConfigError, match=words):
        make_settings(*overrides)
