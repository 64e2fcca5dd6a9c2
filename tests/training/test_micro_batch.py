"""The same effective batch in other micro-batches."""

from __future__ import annotations

import pytest
import torch

from sweeper.config.settings import TrialSettings
from sweeper.training.micro_batch import halved, out_of_memory, resolve, split_batch
from tests.conftest import make_settings


@pytest.mark.parametrize(
    ("effective", "limit", "expected"),
    [(16, 16, (16, 1)), (16, 100, (16, 1)), (16, 7, (4, 4)), (15, 7, (5, 3)), (7, 6, (1, 7))],
)
def test_split_is_the_largest_divisor_up_to_the_limit(
    effective: int, limit: int, expected: tuple[int, int]
) -> None:
    """Micro-batch times accumulation is the effective batch, whatever divides it."""
    micro, accumulation = split_batch(effective, limit)
    assert (micro, accumulation) == expected
    assert micro * accumulation == effective


def test_halving_keeps_the_effective_batch_and_ends_below_one() -> None:
    """6 x 2 becomes 3 x 4, then 1 x 12, then nothing is left to halve."""
    settings: TrialSettings | None = make_settings(
        "training.per_device_train_batch_size=6", "training.gradient_accumulation_steps=2"
    ).trial
    seen = []
    while settings is not None:
        training = settings.training
        seen.append((training.per_device_train_batch_size, training.gradient_accumulation_steps))
        settings = halved(settings)
    assert seen == [(6, 2), (3, 4), (1, 12)]


def test_out_of_memory_halves_what_sharded_trials_are_judged_in_as_well() -> None:
    """Their ranks judge in step; a retry ends only when neither batch can be halved."""
    settings: TrialSettings | None = make_settings(
        *("adapter=none", "quantization=none", "training.optim=adamw_torch"),
        *("training.devices_per_trial=2", "training.fsdp=true"),
        *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1"),
        *("evaluation.per_device_eval_batch_size=4", "evaluation.generation.batch_size=1"),
    ).trial
    seen = []
    while settings is not None:
        training, judged = settings.training, settings.evaluation
        seen.append((training.per_device_train_batch_size, judged.per_device_eval_batch_size))
        settings = halved(settings)
    assert seen == [(2, 4), (1, 2), (1, 1)]


def _real(*overrides: str) -> TrialSettings:
    return make_settings("training=real", *overrides).trial


@pytest.mark.parametrize("on_gpu", [True, False])
def test_without_an_estimate_only_a_gpu_recomputes_and_nothing_grows(on_gpu: bool) -> None:
    """auto means on for a GPU and off for a CPU; the micro-batch stays as given."""
    training = resolve(_real(), lambda _: None, on_gpu=on_gpu).training
    assert training.activation_checkpointing is on_gpu
    assert training.per_device_train_batch_size == 4


@pytest.mark.parametrize(("room", "micro", "checkpointing"), [(2, 4, True), (8, 8, False)])
def test_an_estimate_decides_both(room: int, micro: int, checkpointing: bool) -> None:
    """With room for n examples with kept activations, and twice as many with recomputed ones."""

    def fits(settings: TrialSettings) -> bool:
        training = settings.training
        examples = room * (2 if training.activation_checkpointing else 1)
        return training.per_device_train_batch_size <= examples

    training = resolve(_real(), fits, on_gpu=True).training
    assert training.per_device_train_batch_size == micro
    assert training.effective_batch_size == 16
    assert training.activation_checkpointing is checkpointing


def test_what_is_set_is_not_resolved() -> None:
    """true, false and as_given stay, whatever an estimate says."""
    settings = _real("training.activation_checkpointing=true", "training.micro_batch=as_given")
    assert resolve(settings, lambda _: True, on_gpu=False) == settings


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_by_its_words(error: BaseException, known: bool) -> None:
    """What torch and bitsandbytes raise when memory runs out, and what they raise otherwise."""
    assert out_of_memory(error) is known
