"""A trial's settings as transformers' TrainingArguments."""

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
"""What transformers is told the objective's value as; it keeps the best checkpoint by it."""


def training_arguments(
    settings: TrialSettings,
    schedule: TrialSchedule,
    checkpoints: Path,
    compute_dtype: torch.dtype,
    *,
    ordered: bool,
) -> TrainingArguments:
    """transformers' arguments for a trial; compute dtypes below fp32 are autocast to.

    `ordered` training rows (data.order_by) are taken as they stand, whatever the sampling strategy.
    """
    training = settings.training
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=schedule.total_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        lr_scheduler_kwargs=_scheduler_options(settings),
        warmup_steps=schedule.warmup_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps
        // training.devices_per_trial,
        optim=training.optim,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=use_liger_kernel(settings),
        # Liger's own loss would take the place of a forward that computes ours
        liger_kernel_config={"fused_linear_cross_entropy": False},
        bf16=compute_dtype == torch.bfloat16,
        fp16=compute_dtype == torch.float16,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # the default hides a NaN behind the running mean
        eval_strategy="steps",
        eval_steps=schedule.eval_every,
        save_strategy="steps",
        save_steps=schedule.save_every,
        save_total_limit=None,  # JudgedTrainer removes old ones once the new one is sealed
        load_best_model_at_end=True,
        metric_for_best_model=OBJECTIVE,
        greater_is_better=settings.objective.direction == "maximize",
        train_sampling_strategy="sequential" if ordered else training.train_sampling_strategy,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def use_liger_kernel(settings: TrialSettings) -> bool:
    """Whether Liger's fused layers replace transformers' own; `auto`: on a GPU where it is installed.

    Raises:
        ConfigError: asked for and not available.
    """
    asked = settings.training.use_liger_kernel
    available = torch.cuda.is_available() and find_spec("liger_kernel") is not None
    if asked is True and not available:
        raise ConfigError(
            [
                "training.use_liger_kernel=true: needs a CUDA GPU and the package liger-kernel; "
                "use auto or false"
            ]
        )
    return available if asked == "auto" else asked


@contextmanager
def module_restored(model: torch.nn.Module) -> Iterator[None]:
    """Undo what happens inside to the module of transformers that a model's class comes from.

    Liger replaces layers there when it is applied to one model. Every later one of the process would be
    built of them, also those that are only measured, on a device where Liger's kernels do not run.
    """
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        yield
    finally:
        for name in names.keys() - before.keys():
            del names[name]
        names.update(before)


def refuse_fp16_on_cpu(settings: TrialSettings) -> None:
    """fp16 needs scaled gradients, and torch scales them on GPUs only.

    Raises:
        ConfigError: model.dtype=float16 without a CUDA device.
    """
    if settings.model.dtype == "float16" and not torch.cuda.is_available():
        raise ConfigError(
            [
                "model.dtype=float16: training in float16 needs a CUDA GPU, and none is visible; "
                "use float32, bfloat16 or auto"
            ]
        )


def _scheduler_options(settings: TrialSettings) -> dict[str, int]:
    """transformers hands these to the schedule's function, and only one of them knows cycles."""
    training = settings.training
    if training.lr_scheduler_type != "cosine_with_restarts":
        return {}
    return training.lr_scheduler_kwargs.model_dump()
