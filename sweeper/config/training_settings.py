"""Settings of `training` and `artifacts`, named as in transformers' TrainingArguments."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sweeper.config.section import AutoBool, Positive, SettingsSection, Steps

SHARDABLE = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose states FSDP can shard. Those of bitsandbytes need whole tensors."""


class SchedulerOptions(SettingsSection):
    """The supported part of transformers' lr_scheduler_kwargs."""

    num_cycles: Positive
    """Number of restarts of cosine_with_restarts. Other schedules ignore it."""


class TrainingSettings(SettingsSection):
    """The supported part of transformers' TrainingArguments."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    lr_scheduler_type: Literal[
        "cosine", "cosine_with_restarts", "linear", "constant", "constant_with_warmup"
    ]
    lr_scheduler_kwargs: SchedulerOptions
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)]
    warmup_steps: Annotated[int, Field(ge=0)] | None
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: Positive | None
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    devices_per_trial: Positive
    fsdp: bool
    # group_by_length saved 16 % of a trial's time and cost 0.018 nats (experiments/LOG.md)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"]
    micro_batch: Literal["as_given", "largest"]
    # the last three are bitsandbytes' (Dettmers et al. 2021, arXiv:2110.02861)
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    activation_checkpointing: AutoBool
    use_liger_kernel: AutoBool
    loss_chunk_size: Positive | None
    logging_steps: Positive
    eval_steps: Steps
    eval_delay: Annotated[float, Field(ge=0)]
    """Optimizer steps, or a fraction of the schedule (below 1), before which no evaluation is made."""
    save_steps: Steps | None
    save_total_limit: Positive
    early_stopping_patience: Positive | None
    early_stopping_threshold: Annotated[float, Field(ge=0)]
    early_stopping_min_fraction: Annotated[float, Field(ge=0, le=1)]
    early_stopping_metric: Literal["objective", "eval/loss", "eval/loss_moving_average"]
    moving_average_window: Positive
    # a multiple of the trial's first loss, because an absolute limit would fit one vocabulary only
    divergence_threshold: Annotated[float, Field(gt=1)] | None
    divergence_patience: Positive

    def warmup_length(self, total_steps: int) -> int:
        """Return the warm-up in optimizer steps, never the whole run. A constant rate has none."""
        if self.lr_scheduler_type == "constant":
            return 0
        if self.warmup_steps is not None:
            return self.warmup_steps
        # rounded up, as transformers does
        return min(math.ceil(self.warmup_ratio * total_steps), total_steps - 1)

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimizer step, over all devices of the trial."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def shards(self) -> int:
        """Number of devices over which weights, gradients and optimizer states are sharded."""
        return self.devices_per_trial if self.fsdp else 1

    @model_validator(mode="after")
    def _fsdp_has_devices(self) -> TrainingSettings:
        if self.fsdp and self.devices_per_trial == 1:
            raise ValueError(
                "training.fsdp=true spreads a model over devices: set devices_per_trial to 2 or more"
            )
        if self.fsdp and self.optim not in SHARDABLE:
            raise ValueError(
                f"training.fsdp=true: training.optim={self.optim} cannot be spread over devices. Choose "
                f"{' or '.join(SHARDABLE)}"
            )
        return self

    @model_validator(mode="after")
    def _devices_share_the_batch(self) -> TrainingSettings:
        devices, batch = self.devices_per_trial, self.effective_batch_size
        if batch % devices:
            raise ValueError(
                f"devices_per_trial={devices}: {batch} examples a step (per_device_train_batch_size "
                f"× gradient_accumulation_steps) cannot be shared evenly among {devices} devices"
            )
        return self


class ArtifactSettings(SettingsSection):
    """Files that a trial stores in addition to its adapter or weights."""

    zip: bool
    merged: bool
