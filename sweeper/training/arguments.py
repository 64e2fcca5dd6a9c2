"""Convert a trial's settings into transformers' TrainingArguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import ConfigError
from sweeper.training.schedule import TrialSchedule

OBJECTIVE = "eval_objective"
"""Name of the objective's value in transformers' metrics, which choose the best checkpoint."""


def training_arguments(
    settings: TrialSettings,
    schedule: TrialSchedule,
    checkpoints: Path,
    compute_dtype: torch.dtype,
    *,
    ordered: bool,
    whole_steps: bool = False,
) -> TrainingArguments:
    """Return transformers' arguments for a trial.

    Args:
        settings: the trial, resolved (sweeper.training.micro_batch.resolve).
        schedule: lengths and intervals in optimiser steps.
        checkpoints: folder of the checkpoints.
        compute_dtype: dtype of the forward pass. float16 and bfloat16 are autocast to.
        ordered: True if the rows are trained in their order (data.order_by), not shuffled.
        whole_steps: True if a device's rows of a step come as one batch, and the trainer splits it.
    """
    training = settings.training
    cuda = torch.cuda.is_available()
    # transformers multiplies the effective batch by the devices. Ours is part of the settings and
    # stays the same, so each device accumulates fewer micro-batches
    share = training.effective_batch_size // training.devices_per_trial
    rows = share if whole_steps else training.per_device_train_batch_size
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=schedule.total_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        lr_scheduler_kwargs=_scheduler_options(settings),
        warmup_steps=schedule.warmup_steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        # Rows that complete the last batch of every device would be trained twice (rank_batches.py)
        accelerator_config={"even_batches": False},
        optim=training.optim,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.activation_checkpointing,
        # The reentrant form gives no gradients if no input of a
        # block needs one, as on a frozen base
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=use_liger_kernel(settings),
        # Liger's fused loss would replace the forward pass that computes our loss
        liger_kernel_config={"fused_linear_cross_entropy": False},
        bf16=compute_dtype == torch.bfloat16,
        fp16=compute_dtype == torch.float16,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # the default would replace a NaN by the running mean
        eval_strategy="steps",
        eval_steps=schedule.eval_every,
        eval_delay=schedule.first_look,
        save_strategy="steps",
        save_steps=schedule.save_every,
        save_total_limit=None,  # JudgedTrainer removes old checkpoints once the new one is sealed
        load_best_model_at_end=True,
        metric_for_best_model=OBJECTIVE,
        greater_is_better=settings.objective.direction == "maximize",
        train_sampling_strategy="sequential" if ordered else training.train_sampling_strategy,
        seed=settings.seed,
        data_seed=settings.order_seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    # A worker whose trials are wide sees several GPUs. transformers would spread a narrow trial over
    # all of them (torch.nn.DataParallel)
    _ = arguments.device
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def use_liger_kernel(settings: TrialSettings) -> bool:
    """Return True if Liger's fused layers replace transformers' own.

    `auto` uses them on a GPU if the package is installed.

    Raises:
        ConfigError: use_liger_kernel=true without a GPU or without the package.
    """
    setting = settings.training.use_liger_kernel
    available = torch.cuda.is_available() and find_spec("liger_kernel") is not None
    if setting is True and not available:
        raise ConfigError(
            [
                "training.use_liger_kernel=true needs a CUDA GPU and the package liger-kernel. "
                "Set auto or false"
            ]
        )
    return available if setting == "auto" else setting


@contextmanager
def module_restored(model: torch.nn.Module) -> Iterator[None]:
    """Restore transformers' modelling module of a model's class at the end of the context."""
    # Liger replaces layer classes in that module when it is applied to one model. Every later model of
    # this process would use them, including those on the meta device, where its kernels do not run
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        yield
    finally:
        for name in names.keys() - before.keys():
            del names[name]
        names.update(before)


def refuse_fp16_on_cpu(settings: TrialSettings) -> None:
    """Refuse training in float16 on a CPU.

    Raises:
        ConfigError: model.dtype=float16 without a CUDA device.
    """
    # fp16 needs scaled gradients, and torch's GradScaler does nothing without a GPU
    if settings.model.dtype == "float16" and not torch.cuda.is_available():
        raise ConfigError(
            [
                "model.dtype=float16: training in float16 needs a CUDA GPU, and none is visible. "
                "Set float32, bfloat16 or auto"
            ]
        )


def _scheduler_options(settings: TrialSettings) -> dict[str, int]:
    """Return the options of the learning-rate schedule."""
    # transformers passes them to the schedule's function, and only this schedule accepts num_cycles
    training = settings.training
    if training.lr_scheduler_type != "cosine_with_restarts":
        return {}
    return training.lr_scheduler_kwargs.model_dump()
